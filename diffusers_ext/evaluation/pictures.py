"""Sheets of images and of sequences, put side by side or above each other under titles."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

Box = list[int]  # left, top, right and bottom of a panel in its picture, in pixels


def grid(images: torch.Tensor, columns: int, scale: int = 2) -> Image.Image:
    """A sheet of grey images (count, 1, height, width) in [0, 1], ink on white, row by row."""
    count, _, height, width = images.shape
    rows = count // columns
    sheet = images[: rows * columns].reshape(rows, columns, height, width).permute(0, 2, 1, 3)
    pixels = (1 - sheet.reshape(rows * height, columns * width)).mul(255).round().byte().numpy()
    return Image.fromarray(pixels).resize((columns * width * scale, rows * height * scale), Image.Resampling.BICUBIC)


def places_beside(panels: dict[str, Image.Image], margin: int = 24) -> dict[str, Box]:
    """Where `side_by_side` puts each panel."""
    boxes, left = {}, margin
    for title, panel in panels.items():
        boxes[title] = [left, 2 * margin, left + panel.width, 2 * margin + panel.height]
        left += panel.width + margin
    return boxes


def side_by_side(panels: dict[str, Image.Image], margin: int = 24) -> Image.Image:
    """Sheets of one mode beside each other, each under its title."""
    font, boxes = ImageFont.load_default(size=22), places_beside(panels, margin)
    width = max(box[2] for box in boxes.values()) + margin
    height = max(box[3] for box in boxes.values()) + margin
    canvas = Image.new(next(iter(panels.values())).mode, (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for title, (left, top, _, _) in boxes.items():
        draw.text((left, margin // 2), title, fill="black", font=font)
        canvas.paste(panels[title], (left, top))
    return canvas


def places_stacked(panels: dict[str, Image.Image], margin: int = 12) -> dict[str, Box]:
    """Where `stacked` puts each panel."""
    boxes, top = {}, 0
    for title, panel in panels.items():
        boxes[title] = [margin, top + 3 * margin, margin + panel.width, top + 3 * margin + panel.height]
        top = boxes[title][3] + margin
    return boxes


def stacked(panels: dict[str, Image.Image], margin: int = 12) -> Image.Image:
    """Coloured pictures above each other, each under its title."""
    font, boxes = ImageFont.load_default(size=18), places_stacked(panels, margin)
    width = max(box[2] for box in boxes.values()) + margin
    height = max(box[3] for box in boxes.values()) + margin
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for title, (left, top, _, _) in boxes.items():
        draw.text((left, top - 5 * margin // 2), title, fill="black", font=font)
        canvas.paste(panels[title], (left, top))
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
