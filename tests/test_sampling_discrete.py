"""Bulk sampling of discrete diffusion: texts, token sequences and images of levels."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_discrete import LETTERS, build

from diffusers_ext.cli import main
from diffusers_ext.hub import export_pipeline
from diffusers_ext.sampling import folder as sampling
from diffusers_ext.sampling import sample_to_folder
from diffusers_ext.sampling.sequence_files import write_sequences

STEPS = 3


def draw(pipe, folder, count=5, batch_size=2, **arguments):
    return sample_to_folder(pipe, folder, count, batch_size=batch_size, **{"num_inference_steps": STEPS, **arguments})


def alone(pipe, i: int, **arguments):
    """Sample i as the pipeline itself gives it."""
    generator = [torch.Generator().manual_seed(i)]
    return pipe(generator=generator, **{"num_inference_steps": STEPS, **arguments})


def tokens_of(done) -> np.ndarray:
    with np.load(done.result) as data:
        assert data.files == ["tokens"]
        return data["tokens"]


def test_tokens_are_those_of_their_seeds(tmp_path):
    pipe = build("sequence")
    done = draw(pipe, tmp_path, seed=3)
    assert done.result.name == "tokens_5x10.npz" and done.kind == "sequences" and done.drawn == 5
    tokens = tokens_of(done)
    assert tokens.shape == (5, 10) and tokens.dtype == np.uint8
    expected = torch.cat([alone(pipe, 3 + i, output_type="tokens").tokens for i in range(5)])
    np.testing.assert_array_equal(tokens, expected)
    assert len({row.tobytes() for row in tokens}) > 1
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["settings"]["format"] == "npz" and manifest["result"] == done.result.name
    assert manifest["settings"]["components"]["scheduler"]["config"]["kernel"] == "uniform"


def test_texts_as_files_and_as_lines(tmp_path):
    pipe = build("text")
    files, lines = draw(pipe, tmp_path / "txt"), draw(pipe, tmp_path / "jsonl", format="jsonl")
    assert files.result == (tmp_path / "txt").resolve() and lines.result.name == "samples.jsonl"
    entries = [json.loads(line) for line in lines.result.read_text().splitlines()]
    assert sorted(path.name for path in (tmp_path / "txt").glob("*.txt")) == [f"{i:06d}.txt" for i in range(5)]
    for i, entry in enumerate(entries):
        assert entry["text"] == alone(pipe, i).text[0] == (tmp_path / f"txt/{i:06d}.txt").read_text()
        assert entry["text"] == "".join(LETTERS[token] for token in entry["tokens"])
    np.testing.assert_array_equal(tokens_of(draw(pipe, tmp_path / "npz", format="npz"))[4], entries[4]["tokens"])


def test_an_interruption_changes_nothing(tmp_path, monkeypatch):
    pipe, draw_batch, calls = build("text"), sampling.draw, []
    whole = draw(pipe, tmp_path / "whole", format="jsonl")

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw_batch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "draw", failing)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, tmp_path / "cut", format="jsonl")
    done = draw(pipe, tmp_path / "cut", format="jsonl")
    assert done.drawn == 3 and done.result.read_bytes() == whole.result.read_bytes()
    again = draw(pipe, tmp_path / "cut", format="jsonl")
    assert again.was_finished and again.kind == "sequences"
    (tmp_path / "txt").mkdir()
    draw(pipe, tmp_path / "txt")
    (tmp_path / "txt/000003.txt").unlink()
    with pytest.raises(ValueError, match=r"1 of its files are gone, such as 000003\.txt"):
        draw(pipe, tmp_path / "txt")


def test_images_of_levels_are_images(tmp_path):
    pipe = build("image")
    done = draw(pipe, tmp_path, count=2)
    assert done.kind == "images" and done.result == tmp_path.resolve()
    for i in range(2):
        written = np.asarray(Image.open(tmp_path / f"{i:06d}.png"))
        np.testing.assert_array_equal(written, np.asarray(alone(pipe, i).images[0]))


def test_prompts_samplers_and_schedules(tmp_path):
    pipe = build("text")
    done = draw(pipe, tmp_path / "prompts", count=3, prompts=["ab", "c"], suffix="h", format="jsonl")
    texts = [json.loads(line)["text"] for line in done.result.read_text().splitlines()]
    assert [text[:2] for text in texts][::2] == ["ab", "ab"] and texts[1][0] == "c"
    assert all(text[-1] == "h" for text in texts)
    gillespie = tokens_of(draw(pipe, tmp_path / "gillespie", count=1, sampler="gillespie", format="npz"))
    np.testing.assert_array_equal(gillespie, alone(pipe, 0, sampler="gillespie").tokens)
    edges = {"timesteps": [1.0, 0.3, 0.01], "num_inference_steps": None}
    done = sample_to_folder(pipe, tmp_path / "edges", 1, format="npz", timesteps=edges["timesteps"])
    np.testing.assert_array_equal(tokens_of(done), alone(pipe, 0, **edges).tokens)


def test_given_tokens_stay(tmp_path):
    pipe, rng = build("sequence"), np.random.default_rng(0)
    tokens, given = rng.integers(0, 6, (5, 10), dtype=np.uint8), np.arange(10) < 4
    done = tokens_of(draw(pipe, tmp_path / "out", tokens=tokens, given=given))
    np.testing.assert_array_equal(done[:, :4], tokens[:, :4])
    assert (done[:, 4:] != tokens[:, 4:]).any()
    with pytest.raises(ValueError, match="other settings: tokens"):
        draw(pipe, tmp_path / "out", tokens=(tokens + 1) % 6, given=given)
    for wrong in ({"tokens": tokens}, {"tokens": tokens[:4], "given": given}, {"tokens": tokens, "given": given[:5]}):
        with pytest.raises(ValueError, match=r"tokens must be \(5, length\), and given"):
            draw(pipe, tmp_path / "none", **wrong)
    with pytest.raises(ValueError, match="tokens exclude labels, prompts and images"):
        draw(build("text"), tmp_path / "none", tokens=tokens, given=given, prompts=["a"])


def test_what_cannot_be_asked_for_is_refused_before_a_folder_is_made(tmp_path):
    cases = [
        ("sequence", {"format": "txt"}, "format 'txt' needs a tokenizer"),
        ("sequence", {"format": "png"}, "for sequences, got 'png'"),
        ("image", {"format": "jsonl"}, "for images, got 'jsonl'"),
        ("sequence", {"prompts": ["a"]}, "need a tokenizer"),
        ("sequence", {"suffix": "a"}, "need a tokenizer"),
        ("sequence", {"sampler": "gillespie"}, "decodes a number of masks|nothing to add"),
        ("text", {"timesteps": [0.1, 0.2]}, "strictly decreasing"),
        ("text", {"timesteps": [0.5, 0.1]}, "timesteps must begin at 1"),
        ("text", {"num_inference_steps": "10,10"}, "num_inference_steps must be"),
        ("text", {"labels": [1]}, "takes none"),
        ("text", {"gamma": 2.0}, "does not take gamma"),
    ]
    for variant, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            draw(build(variant), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_an_exported_pipeline_is_sampled_too(tmp_path):
    export_pipeline(build("sequence"), tmp_path / "exported")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    assert tokens_of(draw(pipe, tmp_path / "out", count=1)).shape == (1, 10)


@pytest.mark.parametrize("format", ["npz", "jsonl"])
def test_wrong_batches_are_not_written(format, tmp_path):
    tokenizer, batches = build("text").tokenizer, [np.zeros((2, 4), np.uint8), np.zeros((1, 5), np.uint8)]
    with pytest.raises(ValueError, match="one length, got 5 after 4"):
        write_sequences(iter(batches), 3, tmp_path, format, tokenizer)
    with pytest.raises(ValueError, match="there must be 3 sequences, got 2"):
        write_sequences(iter(batches[:1]), 3, tmp_path, format, tokenizer)
    assert not list(tmp_path.iterdir())


def test_many_tokens_need_wider_integers(tmp_path):
    pipe = build("text")
    wide = pipe.scheduler.from_config(pipe.scheduler.config, vocab_size=300)
    assert sampling.to_integers(torch.full((2, 3), 299), range(2), wide.config.vocab_size).dtype == np.uint16
    with pytest.raises(ValueError, match="must give 2 sequences"):
        sampling.to_integers(torch.zeros(3, 3), range(2), 300)


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_command(tmp_path):
    pipe = build("text")
    tables = {"2": [1.0, 0.4, 1e-5]}
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, timestep_tables=tables)
    pipe.save_pretrained(tmp_path / "model")
    common = ("sample", tmp_path / "model", "--num-samples", 2, "--device", "cpu")
    result = invoke(*common, "--output", tmp_path / "txt", "--prompt", "ab", "--sampler", "gillespie")
    assert result.exit_code == 0, result.output
    assert f"wrote 2 sequences to {(tmp_path / 'txt').resolve()}, 2 of them" in result.output
    assert (tmp_path / "txt/000001.txt").read_text().startswith("ab")

    drawn = {}
    for name, options in {
        "table": ("--num-inference-steps", 2, "--timesteps", "table"),
        "edges": ("--timesteps", "1,0.4,1e-5"),
        "even": ("--num-inference-steps", 2, "--timesteps", "even"),
        "plain": ("--num-inference-steps", 2),
    }.items():
        result = invoke(*common, "--output", tmp_path / name, "--format", "npz", *options)
        assert result.exit_code == 0, result.output
        drawn[name] = (tmp_path / name / "tokens_2x12.npz").read_bytes()
    assert drawn["table"] == drawn["edges"] == drawn["plain"] != drawn["even"]

    refused = invoke(*common, "--output", tmp_path / "none", "--timesteps", "table")
    assert refused.exit_code == 1 and "no table for 50 steps; it has for: 2" in refused.output
    for timesteps in ("even", "1,0.5"):
        refused = invoke("sample", "mnist-unet", "--output", tmp_path / "none", "--timesteps", timesteps)
        assert refused.exit_code == 1 and "with a CTMCScheduler; this model has a" in refused.output
    refused = invoke(*common, "--output", tmp_path / "none", "--timesteps", "1;0.5")
    assert refused.exit_code == 2 and "is not numbers between commas" in refused.output
    assert not (tmp_path / "none").exists()
