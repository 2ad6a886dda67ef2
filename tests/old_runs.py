"""Runs on tiny models, and the script that kept half of each as commit a41ce0f wrote it, in fixtures/before_runs.

    git worktree add before a41ce0f && PYTHONPATH=before python tests/old_runs.py tests/fixtures/before_runs

All data are made of integers, and networks are read from the fixtures, so that every machine finds the same hashes.
"""

import sys
from functools import wraps
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from diffusers_ext import BoostAndSkipPipeline, CTMCScheduler
from diffusers_ext.flow import train_postprocessing_flow
from diffusers_ext.jump_your_steps import optimize_timesteps
from diffusers_ext.sampling import sample_to_folder

FIXTURES = Path(__file__).parent / "fixtures" / "before_runs"


class Stopped(Exception):
    """What an interrupted run ends with."""


def digits() -> BoostAndSkipPipeline:
    """A class-conditional pipeline of 4 x 4 pixels, three classes and a null class."""
    unet = UNet2DModel(
        sample_size=4, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=2, add_attention=False,
        num_class_embeds=4,
    )  # fmt: skip
    return BoostAndSkipPipeline(unet, DDPMScheduler(num_train_timesteps=10), null_class=3)


def saved_digits(folder: Path = FIXTURES) -> BoostAndSkipPipeline:
    pipe = BoostAndSkipPipeline.from_pretrained(folder / "pipeline")
    pipe.register_to_config(_name_or_path="a saved pipeline")  # not the path of this machine
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(pipe, folder: Path, format: str = "npz"):
    return sample_to_folder(pipe, folder, 6, batch_size=2, num_inference_steps=2, format=format)


class Line(nn.Module):
    """v = weight x, on images of 2 x 2 pixels."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, sample, timestep):
        return UNet2DOutput(self.weight * sample)


def trained(folder: Path | None, steps: int = 6, **options):
    samples = (torch.arange(80) * 37 % 251).to(torch.uint8).view(20, 1, 2, 2)
    real = (torch.arange(120) * 53 % 241).to(torch.uint8).view(30, 1, 2, 2)
    arguments = {"batch_size": 4, "log_every": 2, "checkpoint_every": 2, "learning_rate": 0.01, "progress": False}
    return train_postprocessing_flow(samples, real, 3, model=Line(), steps=steps, output=folder, **arguments | options)


def tuned(pipe, folder: Path, on_batch=None):
    """Distances of the mean grey of images to a half."""
    try:
        from diffusers_ext.evaluation import FeatureExtractor
        from diffusers_ext.guidance.tuning import tune_interval
    except ImportError:  # commit a41ce0f
        from diffusers_ext.features import FeatureExtractor
        from diffusers_ext.interval_tuning import tune_interval

    grey = FeatureExtractor("grey", "grey", lambda images: torch.tensor(images).double().flatten(1)[:, :2] / 255)
    reference = torch.full((2,), 0.5, dtype=torch.float64), torch.eye(2, dtype=torch.float64) / 16
    return tune_interval(pipe, grey, reference, [2.0], torch.arange(6) % 3, folder, 3, 0, 3, on_batch)


class Tokens(nn.Module):
    """Log scores that depend on token and time, of 5 tokens and the mask."""

    def __init__(self):
        super().__init__()
        self.calls, self.most = 0, None

    def forward(self, tokens, time):
        self.calls += 1
        if self.most is not None and self.calls > self.most:
            raise Stopped
        columns = torch.arange(6.0) - 2
        return 0.1 * (tokens.unsqueeze(-1) + 1) * columns * time.view(-1, 1, 1).clamp(max=1)


def tables(path: Path | None, method: str, most: int | None = None):
    """Tables of 4 steps; the network fails after so many calls."""
    model = Tokens()
    model.most = most
    data = (torch.arange(48) * 7 % 5).view(8, 6)
    return optimize_timesteps(
        model, CTMCScheduler(vocab_size=6), data, [4], method, batch_size=2, grid_size=16, resume=path, progress=False
    )


def main(folder: Path) -> None:
    from diffusers_ext.hub import export_pipeline
    from diffusers_ext.pipelines.boost_and_skip import BoostAndSkipPipeline as pipeline

    torch.manual_seed(0)
    digits().save_pretrained(folder / "pipeline")
    export_pipeline(saved_digits(folder), folder / "export")
    sampled(saved_digits(folder), folder / "finished")
    call, calls = pipeline.__call__, []

    @wraps(call)
    def failing(self, *arguments, **options):
        calls.append(options)
        if len(calls) > 2:
            raise Stopped
        return call(self, *arguments, **options)

    def stop(candidate, done):
        if len(seen) == 2 and candidate not in seen:
            raise Stopped
        seen.append(candidate) if candidate not in seen else None

    def stopped(run, *arguments):
        try:
            run(*arguments)
        except Stopped:
            return
        raise AssertionError(f"{run} came to its end")

    pipeline.__call__ = failing
    stopped(sampled, saved_digits(folder), folder / "sampling")
    pipeline.__call__, seen = call, []
    stopped(tuned, saved_digits(folder), folder / "tuning", stop)
    for method, most in (("exact", 40), ("golden", 80)):
        stopped(tables, folder / f"tables-{method}", method, most)
    from diffusers_ext.flow import training_run

    save = training_run.TrainingRun.save
    training_run.TrainingRun.save = lambda run, step: stop_at(save, run, step)
    stopped(trained, folder / "training")


def stop_at(save, run, step: int) -> None:
    save(run, step)
    if step == 4:
        raise Stopped


if __name__ == "__main__":
    main(Path(sys.argv[1]))
