"""A confusion matrix as a picture."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 56
LEFT, TOP, RIGHT, BOTTOM = 96, 96, 32, 72
INK = (30, 34, 42)
PALE = (243, 246, 250)
RIGHT_COLOUR = (23, 107, 135)
WRONG_COLOUR = (205, 76, 60)


def confusion_picture(matrix: np.ndarray, title: str) -> bytes:
    """A PNG: one row for each true class, one column for each predicted one."""
    count = len(matrix)
    side = count * CELL
    image = Image.new("RGB", (LEFT + side + RIGHT, TOP + side + BOTTOM), "white")
    draw = ImageDraw.Draw(image)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    for row in range(count):
        for column in range(count):
            _cell(draw, row, column, int(matrix[row, column]), float(share[row, column]))
    font = ImageFont.load_default(20)
    for index in range(count):
        middle = index * CELL + CELL // 2
        draw.text((LEFT - 18, TOP + middle), str(index), INK, font, anchor="rm")
        draw.text((LEFT + middle, TOP + side + 14), str(index), INK, font, anchor="mt")
    draw.text((LEFT, TOP // 2 - 4), title, INK, ImageFont.load_default(26), anchor="lm")
    draw.text((LEFT + side // 2, TOP + side + 56), "predicted digit", INK, font, anchor="mm")
    _upright(image, "true digit", font, (34, TOP + side // 2))
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return data.getvalue()


def _cell(draw: ImageDraw.ImageDraw, row: int, column: int, number: int, share: float) -> None:
    full = RIGHT_COLOUR if row == column else WRONG_COLOUR
    # The root lets single mistakes be seen beside a strong diagonal.
    strength = share**0.5
    colour = tuple(round(p + (f - p) * strength) for p, f in zip(PALE, full, strict=True))
    x, y = LEFT + column * CELL, TOP + row * CELL
    draw.rectangle((x + 1, y + 1, x + CELL - 2, y + CELL - 2), fill=colour)
    if number:
        ink = "white" if strength > 0.55 else INK
        centre = (x + CELL // 2, y + CELL // 2)
        draw.text(centre, str(number), ink, ImageFont.load_default(18), anchor="mm")


def _upright(
    image: Image.Image,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    centre: tuple[int, int],
) -> None:
    """Draw *text* from bottom to top."""
    strip = Image.new("RGB", (160, 32), "white")
    ImageDraw.Draw(strip).text((80, 16), text, INK, font, anchor="mm")
    turned = strip.rotate(90, expand=True)
    image.paste(turned, (centre[0] - turned.width // 2, centre[1] - turned.height // 2))
