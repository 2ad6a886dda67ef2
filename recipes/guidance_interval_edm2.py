"""Guidance interval on ImageNet-512 with EDM2: the settings of the paper's table 1, and its figures.

    python recipes/guidance_interval_edm2.py settings
    python recipes/guidance_interval_edm2.py figure COND.pkl UNCOND.pkl --class-label 88 --class-label 127 --seed 0

Kynkäänniemi et al., NeurIPS 2024, arXiv 2404.07724. The networks are NVIDIA's (github.com/NVlabs/edm2, CC BY-NC-SA):
download a conditional one (S, XXL) and the unconditional XS; they are read without executing anything in them. The
decoder is `stabilityai/sd-vae-ft-mse`. The numbers in the table are the paper's, over 50,000 images; none was measured
here.
"""

from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL
from PIL import Image

from diffusers_ext import EDM2Pipeline, EDMHeunScheduler
from diffusers_ext.checkpoints import load_edm2

# network, metric, what is tuned, arguments of EDM2Pipeline, the metric's value in the paper. All with 32 steps.
# (0.28, 2.90] is given as steps, because its rounded bounds select steps 16 to 22 of the table instead of 15 to 21.
PAPER = [
    ("EDM2-S", "FID", "guidance", {"guidance_scale": 1.4}, 2.23),
    ("EDM2-S", "FID", "interval (0.28, 2.90]", {"guidance_scale": 2.1, "guided_steps": (15, 21)}, 1.68),
    ("EDM2-S", "FD_DINOv2", "guidance", {"guidance_scale": 1.9}, 52.32),
    ("EDM2-S", "FD_DINOv2", "interval (0.60, 5.00]", {"guidance_scale": 3.2, "guided_steps": (13, 19)}, 46.25),
    ("EDM2-XXL", "FID", "guidance", {"guidance_scale": 1.2}, 1.81),
    ("EDM2-XXL", "FID", "interval (0.19, 1.61]", {"guidance_scale": 2.0, "guided_steps": (17, 22)}, 1.40),
    ("EDM2-XXL", "FD_DINOv2", "guidance", {"guidance_scale": 1.7}, 33.09),
    ("EDM2-XXL", "FD_DINOv2", "interval (0.60, 5.00]", {"guidance_scale": 2.9, "guided_steps": (13, 19)}, 29.16),
]
WEIGHTS = (1.0, 3.0, 5.0)  # of the authors' figures
INTERVAL = (17, 22)


def load_pipeline(cond: str, uncond: str, vae: str | None, device: str) -> EDM2Pipeline:
    """Networks in the precision of their files; vae: a Hub id or folder, or None to sample pixels."""
    decoder = None if vae is None else AutoencoderKL.from_pretrained(vae)
    pipe = EDM2Pipeline(load_edm2(cond), EDMHeunScheduler(), decoder, guidance_unet=load_edm2(uncond))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def figure_rows(pipe: EDM2Pipeline, label: int, seed: int, weights, interval, steps: int) -> list[list[Image.Image]]:
    """Two rows of one sample at each weight: guided in every step, and in the interval only."""
    rows = []
    for guided_steps in (None, interval):
        row = []
        for weight in weights:
            generator = torch.Generator().manual_seed(seed)
            row += pipe(
                label, num_inference_steps=steps, guidance_scale=weight, guided_steps=guided_steps, generator=generator
            ).images
        rows.append(row)
    return rows


def with_inset(image: Image.Image, box: tuple[float, float, float]) -> Image.Image:
    """Put the square at box = (left, top, side), as fractions of the width, enlarged into the lower right corner."""
    width = image.width
    left, top, side = (round(value * width) for value in box)
    size = width * 2 // 5
    detail = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    framed = Image.new(image.mode, (size + 2, size + 2), "white")
    framed.paste(detail, (1, 1))
    image = image.copy()
    image.paste(framed, (image.width - size - 2, image.height - size - 2))
    return image


def grid(rows: list[list[Image.Image]], gap: int = 4) -> Image.Image:
    width, height = rows[0][0].size
    sheet = Image.new("RGB", ((width + gap) * len(rows[0]) - gap, (height + gap) * len(rows) - gap), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * (width + gap), y * (height + gap)))
    return sheet


@click.group()
def main():
    """The settings and figures of the guidance interval paper on EDM2."""


@main.command()
def settings():
    """Print table 1 of the paper as arguments of EDM2Pipeline."""
    for network, metric, tuned, options, value in PAPER:
        call = ", ".join(f"{key}={item}" for key, item in options.items())
        click.echo(f"{network:9} {metric:10} {value:6.2f}  {tuned:22} pipe(labels, num_inference_steps=32, {call})")


@main.command()
@click.argument("cond", type=click.Path(exists=True))
@click.argument("uncond", type=click.Path(exists=True))
@click.option(
    "--class-label", "labels", multiple=True, type=int, required=True, help="ImageNet class; can be repeated."
)
@click.option("--seed", "seeds", multiple=True, type=int, default=(0,), help="Can be repeated.")
@click.option("--weight", "weights", multiple=True, type=float, default=WEIGHTS, help="Guidance weight of a column.")
@click.option("--guided-steps", nargs=2, type=int, default=INTERVAL, show_default=True)
@click.option("--steps", default=32, show_default=True)
@click.option("--inset", nargs=3, type=float, default=None, help="left, top, side of a detail to enlarge, 0 to 1.")
@click.option("--vae", default="stabilityai/sd-vae-ft-mse", show_default=True, help="'none' for a network of pixels.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("out/guidance_interval_edm2"))
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def figure(cond, uncond, labels, seeds, weights, guided_steps, steps, inset, vae, output, device):
    """Draw a grid for each class and seed: weights from left to right, every step above, the interval below."""
    pipe = load_pipeline(cond, uncond, None if vae == "none" else vae, device)
    output.mkdir(parents=True, exist_ok=True)
    for label in labels:
        for seed in seeds:
            rows = figure_rows(pipe, label, seed, weights, guided_steps, steps)
            if inset:
                rows = [[with_inset(image, inset) for image in row] for row in rows]
            path = output / f"class{label:03d}_seed{seed}.png"
            grid(rows).save(path)
            click.echo(path)


if __name__ == "__main__":
    main()
