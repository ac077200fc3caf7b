"""Pictures of search results: each query with what was found for it, in one row; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image, ImageDraw

Verdict = Literal["query", "match", "other", "unknown"]

# The captions say it too, for those who cannot tell these colours apart.
_COLOURS = {"query": "black", "match": "#1a9641", "other": "#d7191c", "unknown": "#9e9e9e"}
_SAME_CAMERA = "#2b6cd4"
_THUMBNAIL = (96, 192)  # width and height in pixels; people stand upright
_FRAME, _RING, _GAP, _LINE = 6, 2, 8, 12  # pixels; the ring is the inner part of the frame


@dataclass(frozen=True)
class Tile:
    """One image of a row.

    Attributes:
        image: a `thumbnail_of` it; None where it cannot be read.
        verdict: the colour of its frame.
        captions: lines below it, in ASCII.
        same_camera: as the query; it has a second frame.
    """

    image: Image.Image | None
    verdict: Verdict
    captions: tuple[str, ...] = field(default=())
    same_camera: bool = False


def draw_rows(rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """One picture of all rows, the first tile of each a little apart."""
    width, height = _THUMBNAIL
    num_lines = max(len(tile.captions) for row in rows for tile in row)
    cell_width, cell_height = width + 2 * _FRAME + _GAP, height + 2 * _FRAME + num_lines * _LINE + _GAP
    num_columns = max(map(len, rows))
    canvas = Image.new("RGB", (num_columns * cell_width + 3 * _GAP, len(rows) * cell_height + _GAP), "white")
    for number, row in enumerate(rows):
        for column, tile in enumerate(row):
            left = _GAP + column * cell_width + (2 * _GAP if column else 0)
            _draw_tile(canvas, tile, left, _GAP + number * cell_height)
    return canvas


def _draw_tile(canvas: Image.Image, tile: Tile, left: int, top: int) -> None:
    draw = ImageDraw.Draw(canvas)
    width, height = _THUMBNAIL
    right, bottom = left + width + 2 * _FRAME, top + height + 2 * _FRAME
    draw.rectangle((left, top, right - 1, bottom - 1), fill=_COLOURS[tile.verdict])
    if tile.same_camera:
        inner = _FRAME - _RING
        draw.rectangle((left + inner, top + inner, right - 1 - inner, bottom - 1 - inner), fill=_SAME_CAMERA)
    draw.rectangle((left + _FRAME, top + _FRAME, right - 1 - _FRAME, bottom - 1 - _FRAME), fill="#e0e0e0")
    if tile.image is None:
        draw.text((left + 2 * _FRAME, top + height // 2), "not readable", fill="black")
    else:
        x, y = (width - tile.image.width) // 2, (height - tile.image.height) // 2
        canvas.paste(tile.image, (left + _FRAME + x, top + _FRAME + y))
    for number, caption in enumerate(tile.captions):
        draw.text((left, bottom + number * _LINE), caption, fill="black")


def thumbnail_of(image: Image.Image) -> Image.Image:
    """The image as large as its place in a row allows, with the same ratio of height to width."""
    scale = min(_THUMBNAIL[0] / image.width, _THUMBNAIL[1] / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # PIL warns when a palette with transparency becomes RGB at once.
    return image.convert("RGBA").convert("RGB").resize(size, Image.Resampling.BILINEAR)
