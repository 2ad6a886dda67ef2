"""Checkpoints of discrete diffusion become pipeline folders that give what the checkpoint gives."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from discrete_goldens import GOLDENS, golden, tauldr_files
from safetensors.torch import load_file
from tiny_discrete import letter_tokenizer

from diffusers_ext.checkpoints import convert_countdown, convert_sedd, convert_tauldr
from diffusers_ext.cli import main
from diffusers_ext.models import SEDDTransformer
from diffusers_ext.shipped import load_pipeline


@pytest.mark.parametrize(
    ("name", "case"), [("sedd_absorb_hub", "sedd_absorb_net"), ("sedd_uniform_hub", "sedd_uniform_net")]
)
@torch.no_grad()
def test_sedd(name, case, tmp_path):
    """The folder gives the authors' recorded outputs, and samples."""
    g = golden(case).t
    _, error = convert_sedd(GOLDENS / name, tmp_path / "out")
    loaded = load_pipeline(str(tmp_path / "out"))
    torch.testing.assert_close(loaded.model(g["x"], g["sigma"]).sample, g["log_score"], rtol=2e-5, atol=2e-5)
    kernel, noise = ("absorbing", "loglinear") if "absorb" in name else ("uniform", "geometric")
    assert error == 0 and (loaded.scheduler.config.kernel, loaded.scheduler.config.noise_schedule) == (kernel, noise)
    loaded.set_progress_bar_config(disable=True)
    tokens = loaded(num_inference_steps=3, generator=torch.Generator().manual_seed(0)).tokens
    assert tokens.shape == (1, 24) and tokens.max() < 17
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sedd_in_half_precision_says_what_it_cost(tmp_path):
    (tmp_path / "out").mkdir()
    pipeline, error = convert_sedd(GOLDENS / "sedd_absorb_hub", tmp_path / "out", dtype=torch.float16)
    weights = load_file(tmp_path / "out/model/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert pipeline.dtype == torch.float16 and 0 < error < 0.1


def test_sedd_with_a_tokenizer(tmp_path):
    letters = "abcdefghijklmnopqr"
    for count in (17, 18):
        letter_tokenizer(letters[:count]).save_pretrained(tmp_path / f"{count}")
    convert_sedd(GOLDENS / "sedd_absorb_hub", tmp_path / "out", tokenizer=tmp_path / "17")
    pipe = load_pipeline(str(tmp_path / "out"))
    pipe.set_progress_bar_config(disable=True)
    output = pipe(prompt="hi", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert output.text[0] == "hi" + "".join(letters[token] for token in output.tokens[0, 2:].tolist())
    with pytest.raises(ValueError, match="has 18 tokens, the network 17"):
        convert_sedd(GOLDENS / "sedd_absorb_hub", tmp_path / "more", tokenizer=tmp_path / "18")
    assert not (tmp_path / "more").exists()


@torch.no_grad()
def test_countdown(tmp_path):
    g = golden("sedd_absorb_net").t
    torch.save(load_file(GOLDENS / "sedd_absorb_hub/model.safetensors"), tmp_path / "count.pt")
    convert_countdown(tmp_path / "count.pt", tmp_path / "out", length=24)
    pipe = load_pipeline(str(tmp_path / "out"))
    torch.testing.assert_close(pipe.model(g["x"], g["sigma"]).sample, g["log_score"], rtol=2e-5, atol=2e-5)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.mask_token_id == 17 and pipe(num_inference_steps=2).tokens.shape == (1, 24)


@pytest.mark.parametrize("case", ["ctmc_unet_net", "ctmc_seq_net"])
@torch.no_grad()
def test_tauldr(case, tmp_path):
    recorded = golden(case)
    state = load_file(GOLDENS / f"{case.removesuffix('_net')}_model.safetensors")
    checkpoint, config = tauldr_files(tmp_path, recorded.config, state)
    pipeline, error = convert_tauldr(checkpoint, config, tmp_path / "out", weights="raw")
    pipe = load_pipeline(str(tmp_path / "out"))
    probabilities = pipe.model(recorded.t["x"], recorded.t["t"]).sample.softmax(-1)
    torch.testing.assert_close(probabilities, pipeline.model(recorded.t["x"], recorded.t["t"]).sample.softmax(-1))
    if case == "ctmc_unet_net":
        torch.testing.assert_close(probabilities, recorded.t["probs"], rtol=3e-4, atol=3e-5)
    assert error == 0 and pipe.scheduler.config.time_conditioning == "timestep"
    pipe.set_progress_bar_config(disable=True)
    output = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert (output.images is not None) == (case == "ctmc_unet_net")


def test_a_folder_that_loads_differently_is_not_written(tmp_path, monkeypatch):
    plain, seen = SEDDTransformer.from_pretrained.__func__, []

    def spoiled(cls, *arguments, **named):
        model = plain(cls, *arguments, **named)
        model.output.linear.bias.data += 1
        seen.append(model)
        return model

    monkeypatch.setattr(SEDDTransformer, "from_pretrained", classmethod(spoiled))
    with pytest.raises(ValueError, match="gives other outputs than the checkpoint"):
        convert_sedd(GOLDENS / "sedd_absorb_hub", tmp_path / "out")
    assert seen and not list(tmp_path.iterdir())


def test_refusals_write_nothing(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        convert_sedd("no/such-repository", tmp_path / "full")  # before anything is downloaded
    shutil.copytree(GOLDENS / "sedd_absorb_hub", tmp_path / "sedd")
    settings = json.loads((tmp_path / "sedd/config.json").read_text())
    (tmp_path / "sedd/config.json").write_text(json.dumps({**settings, "graph": {"type": "roulette"}}))
    with pytest.raises(ValueError, match="roulette"):
        convert_sedd(tmp_path / "sedd", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "sedd"]


def test_commands(tmp_path):
    """Each writes a folder that loads, and says what it is; bad input is one line."""
    state = load_file(GOLDENS / "sedd_absorb_hub/model.safetensors")
    torch.save(state, tmp_path / "count.pt")
    checkpoint, config = tauldr_files(
        tmp_path, golden("ctmc_seq_net").config, load_file(GOLDENS / "ctmc_seq_model.safetensors")
    )
    letter_tokenizer().save_pretrained(tmp_path / "tokenizer")
    cases = {
        "sedd": (GOLDENS / "sedd_absorb_hub", "--tokenizer", tmp_path / "tokenizer", "--dtype", "fp16"),
        "countdown": (tmp_path / "count.pt", "--length", 24),
        "tauldr": (checkpoint, config, "--weights", "raw", "--real-time"),
    }
    for name, (source, *rest) in cases.items():
        arguments = ["convert", name, source, *rest, tmp_path / name]
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        assert f"wrote DiscreteDiffusionPipeline with {'SEDD' if name != 'tauldr' else 'CTMC'}" in result.output
    assert load_pipeline(str(tmp_path / "sedd")).tokenizer is not None
    assert load_pipeline(str(tmp_path / "countdown")).model.config.sequence_length == 24
    assert load_pipeline(str(tmp_path / "tauldr")).model.config.integer_time is False
    refused = CliRunner().invoke(main, ["convert", "tauldr", str(checkpoint), str(config), str(tmp_path / "none")])
    assert refused.exit_code == 1 and "holds no averaged weights" in refused.output
    assert not (tmp_path / "none").exists()
