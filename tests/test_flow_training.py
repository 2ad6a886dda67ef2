"""train_postprocessing_flow: the loss on paper, pairs anew, a flow that is known, interruption, NaN, bad data."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from safetensors.torch import load_file
from torch import nn

from diffusers_ext import FlowPostprocessingPipeline
from diffusers_ext.flow import Neighbours, balanced_weights, find_neighbours, flow_loss, train_postprocessing_flow
from diffusers_ext.flow import training as module


class Affine(ModelMixin, ConfigMixin):
    """v = weight x + bias_c + slope t, elementwise on 1-channel images of one pixel, or any other."""

    @register_to_config
    def __init__(self, in_channels: int = 1, sample_size: int | None = None, num_class_embeds: int | None = None):
        super().__init__()
        self.weight, self.slope = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(num_class_embeds or 1))

    def forward(self, sample, timestep, class_labels=None):
        labels = torch.zeros(len(sample), dtype=torch.long) if class_labels is None else class_labels
        shape = (-1, *[1] * (sample.ndim - 1))
        offset = self.bias[labels] + self.slope * timestep.expand(len(sample)) / 1000
        return UNet2DOutput(sample=self.weight * sample + offset.view(shape))


def unet(classes=None) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2, num_class_embeds=classes,
    )  # fmt: skip


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def train(samples, real, k=3, **options):
    return train_postprocessing_flow(samples, real, k, **{"steps": 4, "batch_size": 8, "progress": False, **options})


def test_loss_is_the_equation():
    x0, x1, t = images(4), images(4, 1), torch.tensor([0.0, 0.2, 0.7, 1.0])
    model, labels = Affine(num_class_embeds=3), torch.tensor([2, 0, 1, 2])
    with torch.no_grad():
        model.weight.fill_(0.3), model.slope.fill_(-0.4), model.bias.copy_(torch.tensor([0.1, 0.2, 0.5]))
    time = t.view(4, 1, 1, 1)
    x_t = (1 - time) * x0 + time * x1
    v = 0.3 * x_t - 0.4 * time + torch.tensor([0.5, 0.1, 0.2, 0.5]).view(4, 1, 1, 1)
    torch.testing.assert_close(flow_loss(model, x0, x1, t, labels), ((v - (x1 - x0)) ** 2).mean())


def test_pairs_are_drawn_anew_and_uniformly_from_the_k_nearest():
    samples, real = images(20), images(50, 1)
    found = find_neighbours(samples.flatten(1), real.flatten(1), 7)
    pairs = module.Pairs(samples, real, found.indices[:, :4], torch.arange(20))
    rows = torch.arange(20).repeat(400)
    x0, x1, t, labels = pairs.draw(rows, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert torch.equal(x0, samples[rows]) and torch.equal(labels, rows)
    chosen = (x1[:, None] == real[found.indices[rows]]).flatten(2).all(-1).float()  # (rows, 7)
    assert (chosen.sum(1) == 1).all()
    shares = chosen.mean(0)
    torch.testing.assert_close(shares, torch.tensor([0.25] * 4 + [0.0] * 3), atol=0.02, rtol=0)
    assert t.min() >= 0 and t.max() <= 1 and abs(t.mean() - 0.5) < 0.02


def test_iterations_and_processes_draw_other_samples_neighbours_and_times(monkeypatch):
    drawn = []

    def recording(model, *pairs):
        drawn.append(pairs[:3])
        return flow_loss(model, *pairs)

    monkeypatch.setattr(module, "flow_loss", recording)
    for process in (0, 1):
        # accelerate gives the index from the launcher's state, which is 0 without one
        monkeypatch.setattr(module.Accelerator, "process_index", process)
        train(images(20), images(50, 1), model=Affine(), steps=3, validation_samples=0)
    assert len(drawn) == 6
    for i, one in enumerate(drawn):
        assert not any(torch.equal(a, b) for other in drawn[:i] for a, b in zip(one, other, strict=True))


def test_balanced_pairs_are_drawn_with_their_weights(monkeypatch):
    samples, real = images(20), images(50, 1)
    found = find_neighbours(samples.flatten(1), real.flatten(1), 4)
    weights = balanced_weights(found.indices, len(real))
    made, original = [], module.Pairs
    monkeypatch.setattr(module, "Pairs", lambda *args: made.append(original(*args)) or made[-1])
    for balance in (False, True):
        train(samples, real, 4, model=unet(), balance=balance)
    assert made[0].weights is None and torch.equal(made[1].weights, weights)
    rows = torch.arange(20).repeat(2000)
    _, x1, _, _ = made[1].draw(rows, torch.Generator().manual_seed(0), torch.device("cpu"))
    chosen = (x1[:, None] == real[found.indices[rows]]).flatten(2).all(-1).float()
    torch.testing.assert_close(chosen.view(2000, 20, 4).mean(0), weights, atol=0.05, rtol=0)


def test_kept_samples_are_their_own_targets_and_leave_the_real_ones_to_the_others(monkeypatch):
    samples, real, keep = images(20), images(50, 1), torch.arange(20) < 8
    found = find_neighbours(samples.flatten(1), real.flatten(1), 4)
    made, original = [], module.Pairs
    monkeypatch.setattr(module, "Pairs", lambda *args: made.append(original(*args)) or made[-1])
    train(samples, real, 4, model=unet(), balance=True, keep=keep)
    (pairs,) = made
    torch.testing.assert_close(pairs.weights[8:], balanced_weights(found.indices[8:], len(real)))
    x0, x1, _, _ = pairs.draw(torch.arange(20), torch.Generator().manual_seed(0), torch.device("cpu"))
    assert torch.equal((x0 == x1).flatten(1).all(dim=1), keep)


@pytest.mark.parametrize("keep", [torch.ones(20).bool(), torch.zeros(3).bool(), torch.zeros(20)], ids=str)
def test_keep_must_mark_some_samples(keep):
    with pytest.raises(ValueError, match="keep must be 20 booleans"):
        train(images(20), images(50, 1), model=unet(), keep=keep)


@pytest.mark.parametrize("name", ["keep", "sample_labels"])
def test_a_folder_begun_with_as_many_others_is_refused(tmp_path, name):
    """The same numbers in another order are other data."""
    marks = {"keep": torch.arange(20) < 8, "sample_labels": torch.arange(20) % 3}[name]
    common = {"model": unet(3 if name == "sample_labels" else None), "output": tmp_path / "out"}
    train(images(20), images(50, 1), **common, **{name: marks})
    with pytest.raises(ValueError, match=rf"other settings: {name}\["):
        train(images(20), images(50, 1), **common, **{name: marks.flip(0)})


def test_it_learns_a_known_flow_and_the_pipeline_walks_it():
    """Every real neighbour lies 0.3 above its sample, in class 1 0.2 below: v is that constant."""
    labels = torch.arange(60) % 2
    samples = torch.rand(60, 1, 1, 1, generator=torch.Generator().manual_seed(0)) - 0.5
    real = samples + torch.where(labels == 1, -0.2, 0.3).view(-1, 1, 1, 1)
    own = Neighbours(torch.arange(60)[:, None], torch.zeros(60, 1))
    model = Affine(sample_size=1, num_class_embeds=2)
    trained = train(
        samples, real, 1, model=model, neighbours=own, sample_labels=labels, steps=400, learning_rate=0.02,
        ema_decay=0.9, log_every=200,
    )  # fmt: skip
    assert trained.model is model and not model.training
    assert [row["step"] for row in trained.history] == [200, 400]
    assert trained.history[-1]["validation_loss"] < 1e-5 and trained.history[-1]["loss"] < 1e-4
    torch.testing.assert_close(model.bias.detach(), torch.tensor([0.3, -0.2]), atol=5e-3, rtol=0)
    pipe = FlowPostprocessingPipeline(model, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    result = pipe(latents=samples, class_labels=labels, num_inference_steps=2, output_type="latent").images
    torch.testing.assert_close(result, real, atol=1e-2, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 3])
def test_interrupted_equals_uninterrupted(tmp_path, stop):
    samples, real, labels = images(30), images(40, 1), torch.arange(30) % 3
    options = {"sample_labels": labels, "checkpoint_every": 2, "log_every": 2, "optimizer": "adamw"}
    once = train(samples, real, model=unet(3), steps=6, output=tmp_path / "once", **options)
    train(samples, real, model=unet(3), steps=stop, output=tmp_path / "twice", **options)
    assert (tmp_path / f"twice/checkpoint-{stop}").is_dir()
    # a process that dies while it writes leaves an unfinished folder
    (tmp_path / "twice/checkpoint-5.new").mkdir()
    twice = train(samples, real, model=unet(3), steps=6, output=tmp_path / "twice", **options)
    for a, b in zip(once.model.parameters(), twice.model.parameters(), strict=True):
        assert torch.equal(a, b)
    if stop == 2:
        assert once.history == twice.history
    assert sorted(path.name for path in (tmp_path / "twice").glob("checkpoint-*")) == ["checkpoint-6"]
    done = train(samples, real, model=unet(3), steps=6, output=tmp_path / "twice", **options)
    assert torch.equal(next(done.model.parameters()), next(once.model.parameters()))
    assert json.loads((tmp_path / "once/history.json").read_text()) == once.history
    assert (tmp_path / "once/loss.png").stat().st_size > 1000


def test_weights_are_the_average(tmp_path):
    """The returned weights differ from the last ones, and the checkpoint holds the last ones."""
    trained = train(images(30), images(40, 1), model=unet(), steps=5, output=tmp_path)
    last = load_file(tmp_path / "checkpoint-5/model.safetensors")
    assert any(not torch.equal(last[name], value) for name, value in trained.model.state_dict().items())


def test_neighbours_are_saved_within_classes_and_by_features(tmp_path):
    samples, real = images(30), images(40, 1)
    mine, theirs = torch.arange(30) % 2, torch.arange(40) % 2
    mean = lambda x: x.mean((2, 3))  # noqa: E731
    train(
        samples, real, model=unet(), output=tmp_path, sample_labels=mine, real_labels=theirs, features=mean,
        validation_samples=0,
    )  # fmt: skip
    saved = Neighbours.load(tmp_path / "neighbours.safetensors")
    expected = find_neighbours(mean(samples), mean(real), 3, mine, theirs)
    assert torch.equal(saved.indices, expected.indices)
    assert (theirs[saved.indices] == mine[:, None]).all()
    assert "validation_loss" not in json.loads((tmp_path / "history.json").read_text())[0]


def test_uint8_is_the_same_as_its_floats():
    bytes_ = [(images(count, seed) * 127.5 + 127.5).round().byte() for count, seed in ((30, 0), (40, 1))]
    floats = [part / 127.5 - 1 for part in bytes_]
    one, other = (train(*data, model=unet(), ema_decay=0.5) for data in (bytes_, floats))
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


class Explodes(Affine):
    """Good for three calls, then NaN."""

    calls = 0

    def forward(self, sample, timestep, class_labels=None):
        self.calls += self.training
        output = super().forward(sample, timestep, class_labels)
        return UNet2DOutput(sample=output.sample * (float("nan") if self.calls > 3 else 1))


def test_nan_stops_at_the_last_good_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match=r"kept is the checkpoint of step 2 in .*; use a lower learning_rate"):
        train(images(30), images(40, 1), model=Explodes(), steps=10, output=tmp_path, checkpoint_every=2)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(
        torch.isfinite(value).all() for value in load_file(tmp_path / "checkpoint-2/model.safetensors").values()
    )
    with pytest.raises(FloatingPointError, match="no checkpoint yet"):
        train(images(30), images(40, 1), model=Affine(), learning_rate=1e36, validation_samples=0)


def test_a_loss_that_is_not_finite_stops_where_the_weights_still_are(tmp_path):
    class Harmless(Affine):
        def forward(self, sample, timestep, class_labels=None):
            output = super().forward(sample, timestep, class_labels).sample
            output.register_hook(torch.zeros_like) if output.requires_grad else None
            return UNet2DOutput(sample=output * float("nan"))

    with pytest.raises(FloatingPointError, match="loss nan"):
        train(images(30), images(40, 1), model=Harmless(), output=tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_another_run_in_the_folder_is_refused(tmp_path):
    train(images(30), images(40, 1), model=unet(), output=tmp_path)
    with pytest.raises(ValueError, match=r"other settings: learning_rate: 0\.0002 before, 1\.0 now; seed: 0 before"):
        train(images(30), images(40, 1), model=unet(), output=tmp_path, learning_rate=1.0, seed=3)
    with pytest.raises(ValueError, match="other settings: samples"):
        train(images(30, 5), images(40, 1), model=unet(), output=tmp_path)
    mine, theirs = torch.arange(30) % 2, torch.arange(40) % 2
    for change, names in (
        ({"features": lambda x: x.mean((2, 3))}, "features"),
        ({"max_grad_norm": None}, "max_grad_norm"),
        ({"neighbours": find_neighbours(images(30).flatten(1), images(40, 1).flatten(1), 3)}, "neighbours"),
        ({"sample_labels": mine, "real_labels": theirs}, "sample_labels: .*; real_labels"),
    ):
        with pytest.raises(ValueError, match=f"other settings: {names}: "):
            train(images(30), images(40, 1), model=unet(), output=tmp_path, **change)


def test_a_start_that_was_refused_does_not_bind_the_next(tmp_path):
    with pytest.raises(ValueError, match="got k=41"):
        train(images(30), images(40, 1), 41, model=unet(), output=tmp_path)
    train(images(30), images(40, 1), 3, model=unet(), output=tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text())["k"] == 3


BROKEN = images(30)
BROKEN[7, 0, 0, 0] = float("nan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 41}, "k <= 40"),
        ({"samples": images(30)[..., :7]}, "must have one shape"),
        ({"samples": BROKEN}, "samples must be finite"),
        ({"real": images(40) / 2 + 0.5}, r"real must be images in \[-1, 1\] or uint8, got values from .* 2 x - 1"),
        ({"samples": images(30) * 127}, r"samples must be images in \[-1, 1\]"),
        ({"samples": images(30).long()}, "uint8 pixels or floating point"),
        ({"samples": images(0)}, "samples must be a tensor"),
        ({"model": unet(3)}, "sample_labels must be given: the model is conditional on 3 classes"),
        ({"model": unet(3), "sample_labels": torch.zeros(29, dtype=torch.long)}, "sample_labels must be 30 integers"),
        ({"model": unet(3), "sample_labels": torch.full((30,), 3)}, r"sample_labels must be in \[0, 3\)"),
        ({"real_labels": torch.zeros(40, dtype=torch.long)}, "query_labels must be given"),
        ({"model": unet().half()}, "model must be float32"),
        ({"optimizer": "sgd"}, "optimizer must be one of"),
        ({"steps": 0}, "steps must be >= 1"),
        ({"validation_samples": 30}, r"validation_samples must be in \[0, 30\)"),
        ({"features": "dino"}, 'features must be "pixel" or a function'),
        (
            {"neighbours": Neighbours(torch.zeros(30, 2, dtype=torch.long), torch.zeros(30, 2))},
            "neighbours must hold 3",
        ),
        ({"neighbours": Neighbours(torch.full((30, 3), 40), torch.zeros(30, 3))}, "neighbours must hold 3"),
    ],
)
def test_bad_input(options, message):
    options = {"samples": images(30), "real": images(40, 1), "model": unet(), **options}
    with pytest.raises(ValueError, match=message):
        train(options.pop("samples"), options.pop("real"), options.pop("k", 3), **options)


def test_mixed_precision_runs(tmp_path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        trained = train(images(30), images(40, 1), model=unet(), mixed_precision="bf16")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert {parameter.dtype for parameter in trained.model.parameters()} == {torch.float32}
    assert trained.model(images(1), 0).sample.dtype == torch.float32  # accelerate's wrapper is gone
