"""Checkpoints in the layouts of SEDD, Jump Your Steps and tauLDR."""

import json
import shutil
from typing import get_args, get_type_hints

import pytest
import torch
import yaml
from diffusers import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from discrete_goldens import GOLDENS, golden, tauldr_files
from safetensors.torch import load_file

from diffusers_ext import checkpoints
from diffusers_ext.checkpoints import load_countdown, load_sedd, load_tauldr, sedd_scheduler, tauldr_scheduler


def test_sedd_from_an_older_repository(tmp_path):
    """Weights as pytorch_model.bin."""
    folder = GOLDENS / "sedd_absorb_hub"
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    ours, theirs = load_sedd(tmp_path), load_sedd(folder)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert ours.config.sequence_length == 24 and not ours.training


def test_sedd_from_the_hub(monkeypatch):
    """An id goes to huggingface_hub, with its revision."""
    asked = []

    def download(repository, name, revision=None):
        asked.append((repository, name, revision))
        return str(GOLDENS / "sedd_uniform_hub" / name)

    monkeypatch.setattr("diffusers_ext.checkpoints.sedd.hf_hub_download", download)
    assert load_sedd("louaaron/sedd-small", revision="main").config.vocab_size == 17
    assert asked == [("louaaron/sedd-small", f, "main") for f in ("config.json", "model.safetensors")]


def test_sedd_schedulers():
    absorbing = sedd_scheduler(GOLDENS / "sedd_absorb_hub").config
    assert (absorbing.kernel, absorbing.vocab_size, absorbing.noise_schedule) == ("absorbing", 18, "loglinear")
    uniform = sedd_scheduler(GOLDENS / "sedd_uniform_hub", sampler="tweedie").config
    assert (uniform.kernel, uniform.vocab_size, uniform.noise_schedule) == ("uniform", 17, "geometric")
    assert (uniform.sigma_min, uniform.sigma_max, uniform.sampler) == (1e-4, 20.0, "tweedie")


def test_sedd_refuses_what_it_does_not_know(tmp_path):
    config = json.loads((GOLDENS / "sedd_absorb_hub/config.json").read_text())
    shutil.copyfile(GOLDENS / "sedd_absorb_hub/model.safetensors", tmp_path / "model.safetensors")

    def write(**changes):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))

    write(graph={"type": "roulette"})
    with pytest.raises(ValueError, match='"absorb" or "uniform", got \'roulette\''):
        load_sedd(tmp_path)
    write(model={**config["model"], "n_blocks": 3})
    with pytest.raises(ValueError, match="do not fit its configuration"):
        load_sedd(tmp_path)
    write(model={})
    with pytest.raises(ValueError, match=r"lacks model.hidden_size"):
        load_sedd(tmp_path)


@torch.no_grad()
def test_countdown(tmp_path):
    """The parameters have SEDD's names, so SEDD's recorded network stands in."""
    g = golden("sedd_absorb_net").t
    state = load_file(GOLDENS / "sedd_absorb_hub/model.safetensors")
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "count.pt")
    for path in (tmp_path / "count.pt", GOLDENS / "sedd_absorb_hub/model.safetensors"):
        model = load_countdown(path)
        torch.testing.assert_close(model(g["x"], g["sigma"]).sample, g["log_score"], rtol=2e-5, atol=2e-5)
    state.pop("rotary_emb.inv_freq")
    torch.save(state, tmp_path / "count.pt")
    with pytest.raises(ValueError, match="pass num_heads="):
        load_countdown(tmp_path / "count.pt")
    assert load_countdown(tmp_path / "count.pt", num_heads=2).config.num_heads == 2
    torch.save({"weight": torch.ones(2)}, tmp_path / "count.pt")
    with pytest.raises(ValueError, match="is no CountDown checkpoint"):
        load_countdown(tmp_path / "count.pt")


@pytest.mark.parametrize("nested", [True, False])
@torch.no_grad()
def test_tauldr_takes_the_averaged_weights(nested, tmp_path):
    """The recorded network is put in as the average; the raw weights are others. Keys as of a distributed run."""
    case, state = golden("ctmc_unet_net"), load_file(GOLDENS / "ctmc_unet_model.safetensors")
    order = golden_parameter_order(state)
    raw = {name.replace("net.", "net.module.", 1): torch.zeros_like(state[name]) for name in order}
    ema = {"ema_decay": 0.9999, "ema_num_updates": 7, "ema_shadow_params": [state[name] for name in order]}
    files = tauldr_files(tmp_path, case.config, raw, **(ema if nested else {}))
    if not nested:
        torch.save({"model": raw, **ema}, files[0])
    model = load_tauldr(*files)
    probabilities = model(case.t["x"], case.t["t"]).sample.softmax(-1)
    torch.testing.assert_close(probabilities, case.t["probs"], rtol=3e-4, atol=3e-5)
    assert not any(value.any() for value in load_tauldr(*files, weights="raw").state_dict().values())


def golden_parameter_order(state: dict) -> list[str]:
    """Any order serves where names and averages agree; not the alphabet's, which safetensors writes."""
    return sorted(state, key=lambda name: name[::-1])


def test_tauldr_refuses(tmp_path):
    case, state = golden("ctmc_seq_net"), load_file(GOLDENS / "ctmc_seq_model.safetensors")
    checkpoint, config = tauldr_files(tmp_path, case.config, state)
    with pytest.raises(ValueError, match="holds no averaged weights; use weights='raw'"):
        load_tauldr(checkpoint, config)
    with pytest.raises(ValueError, match='must be "ema" or "raw"'):
        load_tauldr(checkpoint, config, weights="best")
    tauldr_files(tmp_path, case.config, state, ema_shadow_params=[torch.zeros(1)])
    with pytest.raises(ValueError, match="do not match the raw ones"):
        load_tauldr(checkpoint, config)
    tauldr_files(tmp_path, case.config, {})
    with pytest.raises(ValueError, match="holds no parameters"):
        load_tauldr(checkpoint, config, weights="raw")
    config.write_text("model: !!python/object/apply:os.system [echo]")
    with pytest.raises(ValueError, match="is not plain YAML"):
        load_tauldr(checkpoint, config)
    config.write_text(yaml.safe_dump({**case.config, "model": {"name": "Other"}}))
    with pytest.raises(ValueError, match="ImageX0Pred or SequenceTransformer, got 'Other'"):
        load_tauldr(checkpoint, config)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_in_a_checkpoint_is_executed(tmp_path, capsys):
    case = golden("ctmc_seq_net")
    checkpoint, config = tauldr_files(tmp_path, case.config, {})
    torch.save({"model": {"net.x": Evil()}}, checkpoint)
    with pytest.raises(ValueError, match=r"ckpt.pt' cannot be read; is it whole, and a torch file of plain data"):
        load_tauldr(checkpoint, config)
    assert capsys.readouterr().out == ""


def test_tauldr_schedulers(tmp_path):
    expected = {
        "ctmc_unet_net": ("gaussian", 16, "exponential"),
        "ctmc_seq_net": ("uniform", 13, "constant"),
    }
    for case, (kernel, size, noise) in expected.items():
        _, config = tauldr_files(tmp_path, golden(case).config, {})
        scheduler = tauldr_scheduler(config, eps_ratio=1e-6)
        assert (scheduler.config.kernel, scheduler.config.vocab_size) == (kernel, size)
        assert scheduler.config.noise_schedule == noise and scheduler.jumps == "poisson"
        assert scheduler.config.time_conditioning == "timestep" and scheduler.config.eps_ratio == 1e-6
    rate = golden("ctmc_rate_birthdeath_S13")
    rate.config["model"]["name"] = "BirthDeathRateImageX0PredEMA"
    _, config = tauldr_files(tmp_path, rate.config, {})
    torch.testing.assert_close(
        tauldr_scheduler(config).sigma_bar(rate.t["t"]), rate.t["integral_rate_scalar"], rtol=1e-5, atol=1e-6
    )
    rate.config["model"]["name"] = "Other"
    _, config = tauldr_files(tmp_path, rate.config, {})
    with pytest.raises(ValueError, match="must begin with GaussianTargetRate"):
        tauldr_scheduler(config)


@pytest.mark.parametrize("name", [name for name in checkpoints.__all__ if "_" in name and name != "safe_load"])
def test_readers_of_checkpoints_have_one_form(name):
    kinds = {"load": ModelMixin, "scheduler": SchedulerMixin, "convert": checkpoints.Converted}
    returned = get_type_hints(getattr(checkpoints, name))["return"]
    expected = kinds["scheduler" if name.endswith("_scheduler") else name.split("_")[0]]
    for kind in get_args(returned) or (returned,):
        assert issubclass(kind, expected)
