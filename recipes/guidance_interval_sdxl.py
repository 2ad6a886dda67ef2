"""Guidance interval on Stable Diffusion XL, with the setting of the paper, beside guidance in every step.

    python recipes/guidance_interval_sdxl.py --prompt "a photograph of an astronaut riding a horse" --seed 0 --seed 1
    python recipes/guidance_interval_sdxl.py --model FOLDER --variant fp16

Kynkäänniemi et al., NeurIPS 2024, arXiv 2404.07724: 32 Heun steps on sigmas from 14.61 to 0.03 with rho 3, guidance
weight 16 in (0.28, 5.42], the unconditional prediction that of the empty prompt. The interval was chosen by eye, and
there is no metric to reach: the recipe draws, for each seed, a sheet of one row a prompt, at equal noise without
guidance, with a common weight in every step, with weight 16 in every step, and with weight 16 in the interval. The
images themselves and the seconds and network rows of each go into the same folder.
"""

import json
import time
from pathlib import Path

import click
import torch
from diffusers import HeunDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image

from diffusers_ext import GuidanceInterval
from diffusers_ext.evaluation.pictures import side_by_side
from diffusers_ext.guidance.rows import counted_rows
from diffusers_ext.machine.versions import best_device
from diffusers_ext.pipelines.interval import Interval
from diffusers_ext.pipelines.stable_diffusion_xl_guidance_interval import edm_sigmas, timesteps_of_sigmas
from diffusers_ext.runs.lists import INTERVAL, ListsCommand
from diffusers_ext.shipped import load_pipeline

STEPS, RHO, SIGMA_MIN, SIGMA_MAX = 32, 3.0, 0.03, 14.61
WEIGHT, BEST = 16.0, (0.28, 5.42)
PROMPTS = ("a photograph of an astronaut riding a horse", "a lighthouse on a cliff at dusk, oil painting")
SHOWN = 512  # width of an image on the sheet


def load(model: str, variant: str | None, device: str) -> StableDiffusionXLPipeline:
    """The pipeline in float16 on a GPU, float32 elsewhere, with Heun's method from noise of deviation sigma_max."""
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    pipe = load_pipeline(model, dtype=dtype, variant=variant)
    if not isinstance(pipe, StableDiffusionXLPipeline):
        raise click.BadParameter(f"{model} is a {type(pipe).__name__}, not a StableDiffusionXLPipeline")
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def columns(weight: float, common_weight: float, interval: tuple[float, float]) -> dict[str, tuple[float, dict]]:
    """Title, guidance weight and bounds of each column. Raises ValueError for bounds that are none."""
    bounds = {"guidance_interval": interval}
    Interval(**bounds)
    return {
        "no guidance": (1.0, {}),
        f"weight {common_weight:g}": (common_weight, {}),
        f"weight {weight:g}": (weight, {}),
        f"weight {weight:g} in ({interval[0]:g}, {interval[1]:g}]": (weight, bounds),
    }


def draw(
    pipe: StableDiffusionXLPipeline, prompt: str, seed: int, weight: float, bounds: dict, sigmas: torch.Tensor
) -> tuple[Image.Image, dict]:
    """One image at the noise levels `sigmas`, and what it cost; guided in every step if bounds is empty."""
    call = {
        "negative_prompt": "",  # SDXL's default is zeros in place of the empty prompt
        "guidance_scale": weight,
        "timesteps": timesteps_of_sigmas(pipe.scheduler, sigmas),
        "generator": torch.Generator().manual_seed(seed),
    }
    started = time.perf_counter()
    with counted_rows(pipe) as rows:
        if bounds:
            with GuidanceInterval(pipe, **bounds):
                image = pipe(prompt, **call).images[0]
        else:
            image = pipe(prompt, **call).images[0]
    return image, {"rows": sum(rows), "seconds": time.perf_counter() - started}


def sheet(images: dict[str, list[Image.Image]]) -> Image.Image:
    """One column a title, one row a prompt."""
    return side_by_side({title: column(pictures) for title, pictures in images.items()})


def column(pictures: list[Image.Image], gap: int = 8) -> Image.Image:
    width, height = pictures[0].size
    if width > SHOWN:
        width, height = SHOWN, round(height * SHOWN / width)
    strip = Image.new("RGB", (width, (height + gap) * len(pictures) - gap), "white")
    for row, picture in enumerate(pictures):
        strip.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (0, row * (height + gap)))
    return strip


@click.command(cls=ListsCommand)
@click.option("--model", default="stabilityai/stable-diffusion-xl-base-1.0", show_default=True, help="Id or folder.")
@click.option("--variant", default=None, help="Of the weight files, such as fp16, which is half the download.")
@click.option("--prompt", "prompts", multiple=True, default=PROMPTS, show_default=True, help="Can be repeated.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0,), show_default=True, help="Can be repeated.")
@click.option("--weight", default=WEIGHT, show_default=True)
@click.option("--common-weight", default=5.0, show_default=True, help="Of the column for comparison.")
@click.option("--guidance-interval", "--interval", "interval", type=INTERVAL, default=BEST, show_default="0.28:5.42")
@click.option("--steps", default=STEPS, show_default=True, type=click.IntRange(min=2))
@click.option("--output", type=click.Path(path_type=Path), default=Path("out/guidance_interval_sdxl"))
@click.option("--device", default=best_device(), show_default=True)
def main(model, variant, prompts, seeds, weight, common_weight, interval, steps, output, device):
    """Draw a sheet for each seed, in OUTPUT, and write what it cost into OUTPUT/numbers.json."""
    ways = columns(weight, common_weight, interval)
    sigmas = edm_sigmas(steps, SIGMA_MIN, SIGMA_MAX, RHO)
    pipe = load(model, variant, device)
    output.mkdir(parents=True, exist_ok=True)
    draw(pipe, prompts[0], seeds[0], weight, {}, sigmas[-2:])  # the first call takes longer, so it is not timed
    numbers = []
    for seed in seeds:
        images: dict[str, list[Image.Image]] = {title: [] for title in ways}
        for row, prompt in enumerate(prompts):
            for title, (scale, bounds) in ways.items():
                image, cost = draw(pipe, prompt, seed, scale, bounds, sigmas)
                image.save(output / f"seed{seed}_prompt{row}_{list(ways).index(title)}.png")
                images[title].append(image)
                numbers.append({"seed": seed, "prompt": prompt, "guidance": title, **cost})
                click.echo(f"{title:26} {cost['rows']:4d} rows  {cost['seconds']:7.2f} s  seed {seed}  {prompt}")
            sheet(images).save(output / f"seed{seed}.png")
            (output / "numbers.json").write_text(json.dumps(numbers, indent=2) + "\n")
        click.echo(output / f"seed{seed}.png")


if __name__ == "__main__":
    main()
