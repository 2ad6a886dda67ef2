"""DiscreteDiffusionPipeline on text, token sequences and images."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from fresh_process import run_fresh
from peak_memory import peak_bytes
from tiny_discrete import LETTERS, build

from diffusers_ext import CTMCScheduler, DiscreteDiffusionPipeline, SEDDTransformer
from diffusers_ext.hub import export_pipeline

FILE = Path(__file__).parent.parent / "pipelines/discrete_diffusion.py"
VARIANTS = ("text", "sequence", "image")
LENGTHS = {"text": 12, "sequence": 10, "image": 72}


def run(pipe, **options):
    return pipe(
        **{"batch_size": 2, "num_inference_steps": 3, "generator": torch.Generator().manual_seed(7), **options}
    )


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("how", ["with", "without"])
def test_save_and_load_in_a_fresh_process(how, tmp_path):
    """Saved, where diffusers_ext is installed; exported, and by custom_pipeline, where it is not."""
    for variant in VARIANTS:
        pipe, options, folder = build(variant), {"batch_size": 2, "num_inference_steps": 3}, tmp_path / variant
        if how == "with":
            pipe.save_pretrained(folder)
        else:
            export_pipeline(pipe, folder)
        (folder / "options.json").write_text(json.dumps(options))
        (folder / "expected.json").write_text(json.dumps(run(pipe).tokens.tolist()))
    run_fresh("load_discrete.py", how, str(FILE), *(str(tmp_path / v) for v in VARIANTS), cache=tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_types(variant):
    pipe = build(variant)
    default, tokens = run(pipe), run(pipe, output_type="tokens")
    assert torch.equal(default.tokens, tokens.tokens) and tokens.text is None and tokens.images is None
    assert tokens.tokens.shape == (2, LENGTHS[variant]) and tokens.tokens.dtype == torch.int64
    if variant == "text":
        assert default.text == ["".join(LETTERS[token] for token in row) for row in default.tokens.tolist()]
    if variant == "image":
        levels = default.tokens.view(2, 3, 4, 6).permute(0, 2, 3, 1).numpy()
        for image, expected in zip(default.images, levels, strict=True):
            assert image.size == (6, 4)
            np.testing.assert_array_equal(np.asarray(image), (expected / 7 * 255).round().astype(np.uint8))
        np.testing.assert_allclose(run(pipe, output_type="np").images, levels / 7, rtol=1e-6)
        (tensor,) = run(pipe, output_type="pt", return_dict=False)
        torch.testing.assert_close(tensor, default.tokens.view(2, 3, 4, 6) / 7)
    (first,) = run(pipe, return_dict=False)
    if variant == "sequence":
        assert torch.equal(first, default.tokens)
    else:
        assert first == (default.text if variant == "text" else default.images)


@pytest.mark.parametrize("variant", VARIANTS)
def test_generators(variant):
    pipe = build(variant)
    assert torch.equal(run(pipe).tokens, run(pipe).tokens)
    together = run(pipe, generator=seeded(3, 4)).tokens
    assert not torch.equal(together[0], together[1])
    assert torch.equal(run(pipe, generator=seeded(4, 3)).tokens, together.flip(0))
    assert torch.equal(run(pipe, generator=tuple(seeded(3, 4))).tokens, together)
    assert torch.equal(run(pipe, generator=seeded(4), batch_size=1).tokens, together[1:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_given_tokens_stay_at_any_positions(variant):
    pipe = build(variant)
    length = LENGTHS[variant]
    generator = torch.Generator().manual_seed(1)
    tokens, given = (
        torch.randint(6, (2, length), generator=generator),
        torch.rand(2, length, generator=generator) < 0.5,
    )
    seen = []

    def spy(module, inputs):
        seen.append(inputs[0])

    pipe.model.register_forward_pre_hook(spy)
    out = run(pipe, tokens=tokens, given=given).tokens
    assert torch.equal(out[given], tokens[given]) and not torch.equal(out, tokens)
    assert all(torch.equal(x[given], tokens[given]) for x in seen)
    prefix = run(pipe, tokens=tokens[0], given=torch.arange(length) < 4, batch_size=3).tokens
    assert torch.equal(prefix[:, :4], tokens[:1, :4].expand(3, -1))


def test_prompt_and_suffix():
    pipe = build("text")
    out = run(pipe, prompt=["abc", "hg"], suffix="de", batch_size=None)
    assert out.text[0].startswith("abc") and out.text[1].startswith("hg")
    assert all(text.endswith("de") and len(text) == 12 for text in out.text)
    assert len(run(pipe, prompt="abc", batch_size=3).text) == 3
    assert len(run(pipe, prompt="abc", sequence_length=5).text[0]) == 5


@pytest.mark.parametrize(("sampler", "calls"), [("euler", 4), ("tweedie", 4), ("gillespie", 3)])
def test_samplers_of_one_call(sampler, calls):
    """The network runs once a step and once for the final denoising, which gillespie does not need."""
    pipe, times = build("text"), []
    pipe.model.register_forward_pre_hook(lambda module, inputs: times.append(inputs[1].clone()))
    out = run(pipe, sampler=sampler)
    assert (out.tokens < 8).all() and len(times) == calls == pipe.num_timesteps
    assert pipe.scheduler.config.sampler == "euler"
    assert all((a >= b).all() for a, b in pairwise(times))
    scheduler = CTMCScheduler(vocab_size=9)
    if sampler != "gillespie":
        scheduler.set_timesteps(3)
        torch.testing.assert_close(torch.stack(times)[:, 0], scheduler.sigma_bar(scheduler.timesteps))


def test_loop_is_the_schedulers():
    """What the docstring of CTMCScheduler shows gives the same tokens."""
    pipe, generator = build("text"), torch.Generator().manual_seed(7)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(timesteps=[1.0, 0.4, 1e-4])
    x = scheduler.sample_prior((2, 12), generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipe.model(x, scheduler.model_time(t, 2)).sample, t, x, generator).prev_sample
    assert torch.equal(run(pipe, timesteps=[1.0, 0.4, 1e-4]).tokens, x)


def test_corrector_steps_are_taken_after_the_entry_time():
    pipe, calls = build("sequence"), []
    pipe.scheduler = CTMCScheduler.from_config(
        pipe.scheduler.config, num_corrector_steps=2, corrector_entry_time=0.6, corrector_step_size_multiplier=1.5
    )
    pipe.model.register_forward_pre_hook(lambda module, inputs: calls.append(round(float(inputs[1][0]), 2)))
    taken = []
    step_correct = pipe.scheduler.step_correct

    def spy(output, time, sample, size, generator):
        taken.append((round(time, 2), round(size, 2)))
        return step_correct(output, time, sample, size, generator)

    pipe.scheduler.step_correct = spy
    run(pipe, timesteps=[1.0, 0.5, 0.2, 0.1])
    assert calls == [1.0, 0.5, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1]
    assert taken == [(0.2, 0.45)] * 2 + [(0.1, 0.15)] * 2


def test_callback_sees_and_replaces_the_tokens():
    pipe, seen = build("text"), []

    def watch(pipeline, step, timestep, tensors):
        assert pipeline is pipe and list(tensors) == ["tokens"]
        seen.append((step, float(timestep), tensors["tokens"].clone()))
        return {}

    untouched = run(pipe, callback_on_step_end=watch).tokens
    assert torch.equal(untouched, run(pipe).tokens) and torch.equal(seen[-1][2], untouched)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    blank = run(pipe, callback_on_step_end=lambda p, i, t, tensors: {"tokens": tensors["tokens"] * 0}, prompt="h")
    assert (blank.tokens[:, 0] == 7).all() and (blank.tokens[:, 1:] == 0).all()


def test_tables_of_the_scheduler_are_used():
    pipe = build("text")
    table = {"timestep_tables": {"2": [1.0, 0.2, 1e-5]}, "timestep_spacing": "table"}
    pipe.scheduler = CTMCScheduler.from_config(pipe.scheduler.config, **table)
    assert torch.equal(run(pipe, num_inference_steps=2).tokens, run(build("text"), timesteps=[1.0, 0.2, 1e-5]).tokens)


def test_progress_bar(capsys):
    pipe = build("text")
    pipe.set_progress_bar_config(disable=False)
    run(pipe)
    assert "4/4" in capsys.readouterr().err


def test_reduced_precision():
    pipe = build("text").to(torch.bfloat16)
    outputs = []
    pipe.model.register_forward_hook(lambda module, inputs, output: outputs.append(output.sample.dtype))
    assert (run(pipe).tokens < 8).all()
    assert set(outputs) == {torch.bfloat16}


def test_sampling_needs_less_than_two_vocabulary_sized_tensors():
    """The network's output and a part of another, whatever the batch."""
    sizes = {"hidden_size": 16, "cond_dim": 8, "num_blocks": 1, "num_heads": 2}
    pipe = DiscreteDiffusionPipeline(
        SEDDTransformer(vocab_size=20_000, **sizes).eval(), CTMCScheduler(vocab_size=20_000)
    )
    pipe.set_progress_bar_config(disable=True)
    peak = peak_bytes(lambda: run(pipe, batch_size=4, sequence_length=256, num_inference_steps=2))
    assert 1 < peak / (4 * 256 * 20_000 * 4) < 2


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("text", {"prompt": "abcdefg", "suffix": "abcdefg"}, "are 14 tokens long, the sequence is 12"),
        ("text", {"prompt": ["a", "b", "c"]}, "batch_size=2, but 3 prompts"),
        ("text", {"prompt": ["a", "b"], "suffix": ["a", "b", "c"]}, "lists of one length"),
        ("text", {"tokens": torch.zeros(12, dtype=torch.long)}, "tokens and given belong together"),
        ("text", {"output_type": "pil"}, "has no image shape"),
        ("text", {"output_type": "pt"}, "has no image shape"),
        ("text", {"output_type": "latent"}, "output_type must be"),
        ("text", {"generator": seeded(1)}, "a list of 1, but batch_size is 2"),
        ("text", {"sequence_length": 0}, "sequence_length must be"),
        ("text", {"batch_size": 0}, "batch_size must be"),
        ("text", {"sampler": "ddim"}, "sampler must be one of"),
        ("text", {"timesteps": [0.5, 0.6]}, "strictly decreasing"),
        ("text", {"timesteps": [0.5, 0.1]}, "timesteps must begin at 1, where sampling starts from noise"),
        ("sequence", {"timesteps": torch.tensor([0.99, 0.1])}, "timesteps must begin at 1"),
        ("text", {"callback_on_step_end_tensor_inputs": ["latents"]}, "has .'latents'.; allowed are"),
        ("sequence", {"prompt": "abc"}, "need a tokenizer"),
        ("sequence", {"output_type": "text"}, "needs a tokenizer"),
        ("sequence", {"sampler": "gillespie"}, "decodes a number of masks|nothing to add"),
    ],
)
def test_inputs_that_are_refused(variant, options, message):
    with pytest.raises(ValueError, match=message):
        run(build(variant), **options)


def test_given_tokens_that_are_refused():
    pipe, tokens, given = build("text"), torch.zeros(12, dtype=torch.long), torch.ones(12, dtype=torch.bool)
    for changes, message in [
        ({"tokens": tokens + 8}, r"given tokens must be in \[0, 8\), got \[8\]"),
        ({"tokens": tokens.float()}, "tokens must be integers"),
        ({"given": given.long()}, "given must be boolean"),
        ({"given": given[:5]}, "given must be boolean"),
        ({"sequence_length": 9}, "tokens have the length 12"),
        ({"prompt": "a"}, "exclude each other"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(pipe, **{"tokens": tokens, "given": given, **changes})


def test_other_schedulers_are_refused():
    pipe = build("text")
    pipe.scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="needs a CTMCScheduler, got DDPMScheduler"):
        run(pipe)


def test_models_without_a_length_are_refused():
    pipe = build("text")
    pipe.model.register_to_config(sequence_length=None)
    with pytest.raises(ValueError, match="pass sequence_length="):
        run(pipe)
    assert run(pipe, sequence_length=4).tokens.shape == (2, 4)
