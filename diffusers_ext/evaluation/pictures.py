"""Sheets of images and of sequences, put side by side or above each other under titles."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

Box = list[int]  # left, top, right and bottom of a panel in its picture, in pixels


def grid(images: torch.Tensor, columns: int, scale: int = 2) -> Image.Image:
    """A sheet of images (count, 1 or 3, height, width) in [0, 1], row by row; grey ones are ink on white."""
    count, channels, height, width = images.shape
    rows = count // columns
    sheet = images[: rows * columns].reshape(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    sheet = sheet.reshape(rows * height, columns * width, channels)
    sheet = 1 - sheet[..., 0] if channels == 1 else sheet
    pixels = sheet.mul(255).round().byte().numpy()
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

    Args:
        tokens: (count, length) integers.
        num_tokens: size of the vocabulary.
        marked: (count, length) bool, cells that get a red edge on their left.
        width: of a cell in pixels.
        height: of a cell in pixels.
    """
    depth = (tokens.numpy() / (num_tokens - 1))[..., None]
    colours = 255 - depth * (255 - np.array([13, 44, 92]))
    pixels = colours.round().astype(np.uint8).repeat(height, axis=0).repeat(width, axis=1)
    red = np.zeros(pixels.shape[:2], dtype=bool)
    for offset in range(width // 2):
        red[:, offset::width] = marked.numpy().repeat(height, axis=0)
    pixels[red] = (220, 30, 30)
    return Image.fromarray(pixels)


def labelled_grid(
    cells: Sequence[Sequence[Image.Image]], rows: Sequence[str], columns: Sequence[str], title: str = ""
) -> Image.Image:
    """Pictures in rows and columns, each row named at its left, each column at its top; the title is above all.

    Pictures are enlarged by a whole factor, or made smaller, so that a cell is 128 to 512 pixels wide. Names may have
    several lines; long lines are broken.

    Args:
        cells: row by row, of one size a picture or of several.
        rows: names of the rows; as of columns, of several lines each if need be, long ones are broken.
        columns: names of the columns.
        title: above all.
    """
    gap, font = 8, ImageFont.load_default(size=15)
    pictures = [[_sized(picture.convert("RGB")) for picture in row] for row in cells]
    width = max(picture.width for row in pictures for picture in row)
    height = max(picture.height for row in pictures for picture in row)
    rows, columns = [_broken(name, font, 220) for name in rows], [_broken(name, font, width) for name in columns]
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = 2 * gap + max(_size(measure, name, font)[0] for name in rows)
    title = _broken(title, font, left + len(columns) * (width + gap) - 2 * gap)
    above = gap + _size(measure, title, font)[1] + (gap if title else 0)
    top = above + max(_size(measure, name, font)[1] for name in columns) + gap
    height = max(height, *(_size(measure, name, font)[1] for name in rows))
    canvas = Image.new("RGB", (left + len(columns) * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.multiline_text((gap, gap), title, fill="black", font=font)
    for j, name in enumerate(columns):
        draw.multiline_text((left + j * (width + gap), above), name, fill="black", font=font)
    for i, (name, row) in enumerate(zip(rows, pictures, strict=True)):
        draw.multiline_text((gap, top + i * (height + gap)), name, fill="black", font=font)
        for j, picture in enumerate(row):
            canvas.paste(picture, (left + j * (width + gap), top + i * (height + gap)))
    return canvas


def _sized(picture: Image.Image, least: int = 128, most: int = 512) -> Image.Image:
    if picture.width < least:
        factor = -(-least // picture.width)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if picture.width > most:
        return picture.resize((most, max(1, picture.height * most // picture.width)), Image.Resampling.LANCZOS)
    return picture


def _broken(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text with a line break where a line would be wider than so many pixels."""
    lines = []
    for line in text.split("\n"):
        lines.append("")
        for word in line.split(" "):
            longer = f"{lines[-1]} {word}" if lines[-1] else word
            if lines[-1] and font.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    return "\n".join(lines)


def _size(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    _, _, right, bottom = draw.multiline_textbbox((0, 0), text, font=font)
    return round(right), round(bottom) if text else 0
