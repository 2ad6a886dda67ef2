"""Sheets of images and of sequences, put side by side or above each other under titles."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


def grid(images: torch.Tensor, columns: int, scale: int = 2) -> Image.Image:
    """A sheet of grey images (count, 1, height, width) in [0, 1], ink on white, row by row."""
    count, _, height, width = images.shape
    rows = count // columns
    sheet = images[: rows * columns].reshape(rows, columns, height, width).permute(0, 2, 1, 3)
    pixels = (1 - sheet.reshape(rows * height, columns * width)).mul(255).round().byte().numpy()
    return Image.fromarray(pixels).resize((columns * width * scale, rows * height * scale), Image.Resampling.BICUBIC)


def side_by_side(panels: dict[str, Image.Image], margin: int = 24) -> Image.Image:
    """Sheets of one mode beside each other, each under its title."""
    font = ImageFont.load_default(size=22)
    width = sum(panel.width + margin for panel in panels.values()) + margin
    height = max(panel.height for panel in panels.values()) + 3 * margin
    canvas = Image.new(next(iter(panels.values())).mode, (width, height), "white")
    draw, left = ImageDraw.Draw(canvas), margin
    for title, panel in panels.items():
        draw.text((left, margin // 2), title, fill="black", font=font)
        canvas.paste(panel, (left, 2 * margin))
        left += panel.width + margin
    return canvas


def stacked(panels: dict[str, Image.Image], margin: int = 12) -> Image.Image:
    """Coloured pictures above each other, each under its title."""
    font = ImageFont.load_default(size=18)
    width = max(panel.width for panel in panels.values()) + 2 * margin
    height = sum(panel.height + 4 * margin for panel in panels.values())
    canvas = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(canvas), 0
    for title, panel in panels.items():
        draw.text((margin, top + margin // 2), title, fill="black", font=font)
        canvas.paste(panel, (margin, top + 3 * margin))
        top += panel.height + 4 * margin
    return canvas


def sequences_picture(
    tokens: torch.Tensor, num_tokens: int, marked: torch.Tensor, width: int = 4, height: int = 8
) -> Image.Image:
    """Token sequences (count, length) as rows of cells, from white for token 0 to dark blue for the last one.

    marked: (count, length) bool, cells that get a red edge on their left. width, height: of a cell in pixels.
    """
    depth = (tokens.numpy() / (num_tokens - 1))[..., None]
    colours = 255 - depth * (255 - np.array([13, 44, 92]))
    pixels = colours.round().astype(np.uint8).repeat(height, axis=0).repeat(width, axis=1)
    red = np.zeros(pixels.shape[:2], dtype=bool)
    for offset in range(width // 2):
        red[:, offset::width] = marked.numpy().repeat(height, axis=0)
    pixels[red] = (220, 30, 30)
    return Image.fromarray(pixels)
