"""Sheets of grey images, put side by side under titles."""

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
    """Sheets beside each other, each under its title."""
    font = ImageFont.load_default(size=22)
    width = sum(panel.width + margin for panel in panels.values()) + margin
    height = max(panel.height for panel in panels.values()) + 3 * margin
    canvas = Image.new("L", (width, height), 255)
    draw, left = ImageDraw.Draw(canvas), margin
    for title, panel in panels.items():
        draw.text((left, margin // 2), title, fill=0, font=font)
        canvas.paste(panel, (left, 2 * margin))
        left += panel.width + margin
    return canvas
