"""Pictures of what training sees and what retrieval finds, drawn with PIL; pure: arrays and words to images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, groupby

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

# Of different brightness too, for those to whom red and green look alike.
RIGHT: Colour = (40, 185, 90)
WRONG: Colour = (190, 25, 35)
QUERY: Colour = (40, 90, 200)
SAME_CAMERA: Colour = (250, 190, 0)
_NO_IMAGE: Colour = (224, 224, 224)
_PAPER: Colour = (255, 255, 255)
_INK: Colour = (30, 30, 30)
_GREY: Colour = (110, 110, 110)
_GRID: Colour = (225, 225, 225)
_CURVES: tuple[Colour, ...] = ((40, 90, 200), (220, 120, 20), (0, 150, 70), (150, 60, 160), (215, 40, 40))

_MARGIN = 16
_TITLE, _LABEL, _TEXT = 18, 13, 12  # sizes of letters
_LINE = 16  # from one line of text to the next
_FRAME, _RING, _GAP = 4, 2, 6  # the ring lies between the frame and the image
_IMAGE_HEIGHT = 168  # of a person in a ranking
_LEAST_WIDTH = 76  # "cos -0.83" fits below an image
_BATCH_HEIGHT, _BATCH_WIDTH = 128, 1120  # of a person, and of the whole grid
_OVERSIZE = 3  # curves are drawn that much larger and reduced, which smooths them
_CHART = (760, 480)


@dataclass(frozen=True)
class Shown:
    """An image with what is said about it.

    Attributes:
        image: uint8 [H, W, 3]; None where it cannot be read.
        lines: below it.
        same_camera: as the query, which a ring says.
    """

    image: NDArray[np.uint8] | None
    lines: tuple[str, ...]
    same_camera: bool = False


def denormalise(images: NDArray[np.floating], mean: Sequence[float], std: Sequence[float]) -> NDArray[np.uint8]:
    """The pixels that a model's input [B, 3, H, W] stands for: uint8 [B, H, W, 3]."""
    pixels = images.transpose(0, 2, 3, 1) * np.asarray(std) + np.asarray(mean)
    rounded: NDArray[np.uint8] = np.rint(pixels * 255).clip(0, 255).astype(np.uint8)
    return rounded


def ranked_gallery(query: Shown, found: Sequence[Shown], is_match: Sequence[bool | None]) -> Image.Image:
    """A query and what was found for it, the closest first: green frames are right, red ones wrong.

    Args:
        query: framed in blue.
        found: without those that the protocol leaves out.
        is_match: of each of them; None where nobody knows, which gives no frame.
    """
    frames = [QUERY, *(None if match is None else RIGHT if match else WRONG for match in is_match)]
    heads = ["query", *map(str, range(1, len(found) + 1))]
    cells = [_cell(*of_one) for of_one in zip([query, *found], heads, frames, strict=True)]
    return _beside(cells, [3 * _GAP] + [_GAP] * len(found))  # the query stands apart


def _beside(images: Sequence[Image.Image], gaps: Sequence[int]) -> Image.Image:
    """The images in a row, with a gap behind each but the last."""
    starts = [0, *accumulate(image.width + gap for image, gap in zip(images, gaps, strict=True))]
    row = Image.new("RGB", (starts[-1] - gaps[-1], max(image.height for image in images)), _PAPER)
    for image, left in zip(images, starts, strict=False):
        row.paste(image, (left, 0))
    return row


def _cell(shown: Shown, head: str, frame: Colour | None) -> Image.Image:
    image = _no_image() if shown.image is None else _fitted(shown.image, _IMAGE_HEIGHT)
    width = max(image.width + 2 * _FRAME, _LEAST_WIDTH)
    top = _LINE + 2
    cell = Image.new("RGB", (width, top + image.height + 2 * _FRAME + 4 + _LINE * len(shown.lines)), _PAPER)
    draw = ImageDraw.Draw(cell)
    left = (width - image.width) // 2
    if frame is not None:
        box = (left - _FRAME, top, left + image.width + _FRAME - 1, top + image.height + 2 * _FRAME - 1)
        draw.rectangle(box, fill=frame)
    if shown.same_camera:
        inner = _FRAME - _RING
        box = (left - _RING, top + inner, left + image.width + _RING - 1, top + image.height + _FRAME + _RING - 1)
        draw.rectangle(box, fill=SAME_CAMERA)
    cell.paste(image, (left, top + _FRAME))
    _write(draw, (width // 2, 0), head, fill=_GREY, anchor="ma")
    for number, line in enumerate(shown.lines):
        _write(draw, (width // 2, top + image.height + 2 * _FRAME + 4 + _LINE * number), line, anchor="ma")
    return cell


def _no_image() -> Image.Image:
    place = Image.new("RGB", (_IMAGE_HEIGHT // 2, _IMAGE_HEIGHT), _NO_IMAGE)
    _write(ImageDraw.Draw(place), (_IMAGE_HEIGHT // 4, _IMAGE_HEIGHT // 2), "not readable", anchor="mm")
    return place


def sheet(rows: Sequence[Image.Image], title: str, note: str = "") -> Image.Image:
    """The rows below each other, under a title and a note."""
    width = max([row.width for row in rows] + [_width(title, _TITLE), _width(note, _TEXT)])
    top = _MARGIN + _TITLE + 8 + (_LINE if note else 0) + 10
    height = top + sum(row.height + _MARGIN for row in rows)
    whole = Image.new("RGB", (width + 2 * _MARGIN, height), _PAPER)
    draw = ImageDraw.Draw(whole)
    _write(draw, (_MARGIN, _MARGIN), title, size=_TITLE)
    _write(draw, (_MARGIN, _MARGIN + _TITLE + 8), note, fill=_GREY)
    for row in rows:
        whole.paste(row, (_MARGIN, top))
        top += row.height + _MARGIN
    return whole


def batch_grid(images: NDArray[np.uint8], pids: Sequence[int], title: str, note: str = "") -> Image.Image:
    """The images of a batch; those of one identity that follow each other stand together, under its number.

    Args:
        images: [B, H, W, 3].
        pids: [B].
        title: above all.
        note: below the title.
    """
    fitted = iter([_fitted(image, _BATCH_HEIGHT) for image in images])
    groups = [_group([next(fitted) for _ in same], f"pid {pid}") for pid, same in groupby(pids)]
    num_columns = max(1, _BATCH_WIDTH // (max(group.width for group in groups) + _MARGIN))
    rows = [groups[start : start + num_columns] for start in range(0, len(groups), num_columns)]
    return sheet([_beside(row, [_MARGIN] * len(row)) for row in rows], title, note)


def _group(images: Sequence[Image.Image], head: str) -> Image.Image:
    row = _beside(images, [2] * len(images))
    group = Image.new("RGB", (max(row.width, _width(head, _TEXT)), _LINE + row.height), _PAPER)
    _write(ImageDraw.Draw(group), (0, 0), head)
    group.paste(row, (0, _LINE))
    return group


def cmc_chart(curves: Mapping[str, Sequence[float]], title: str) -> Image.Image:
    """CMC curves: the percentage of queries with a match among the first k images, over k.

    Args:
        curves: name -> fractions of rank 1, 2 and so on.
        title: above all.
    """
    lowest = min(min(curve) for curve in curves.values())
    axes = _Axes(num_ranks=max(map(len, curves.values())), bottom=min(math.floor(10 * lowest) * 10, 90))
    width, height = _CHART
    chart = Image.new("RGB", (width * _OVERSIZE, height * _OVERSIZE), _PAPER)
    draw = _Pen(chart)
    axes.draw(draw)
    draw.text((_Axes.left, 24), title, size=_TITLE, anchor="lm")
    _draw_legend(draw, list(curves))  # before the curves, as it hides what lies under it
    for number, curve in enumerate(curves.values()):
        colour = _CURVES[number % len(_CURVES)]
        points = [axes.place(k, 100 * fraction) for k, fraction in enumerate(curve, 1)]
        draw.line(points, colour, 2)
        if len(points) <= 60:
            draw.dots(points, colour, 2.5)
    return chart.reduce(_OVERSIZE)


def _draw_legend(draw: _Pen, names: Sequence[str]) -> None:
    left = _Axes.right - 12 - max(draw.width(name) for name in names)
    top = _Axes.lower - 14 - 20 * len(names)
    draw.box((left - 52, top, _Axes.right - 1, _Axes.lower - 1), _PAPER)
    for number, name in enumerate(names):
        y = top + 10 + 20 * number
        colour = _CURVES[number % len(_CURVES)]
        draw.line([(left - 42, y), (left - 12, y)], colour, 2)
        draw.dots([(left - 27, y)], colour, 2.5)
        draw.text((left, y), name, anchor="lm")


@dataclass(frozen=True)
class _Axes:
    """Where a rank and a percentage lie on the chart."""

    num_ranks: int
    bottom: int  # the lowest percentage that is shown, a multiple of 10
    left, right, upper, lower = 64, _CHART[0] - 24, 48, _CHART[1] - 56

    def place(self, rank: float, percentage: float) -> tuple[float, float]:
        along = (rank - 1) / max(self.num_ranks - 1, 1)
        up = (percentage - self.bottom) / (100 - self.bottom)
        return self.left + along * (self.right - self.left), self.lower - up * (self.lower - self.upper)

    def draw(self, pen: _Pen) -> None:
        percent_step = 10 if self.bottom < 50 else 5 if self.bottom < 80 else 2
        for percentage in range(self.bottom, 101, percent_step):
            _, y = self.place(1, percentage)
            pen.line([(self.left, y), (self.right, y)], _GRID, 1)
            pen.text((self.left - 10, y), str(percentage), anchor="rm")
        for rank in self._ticks():
            x, _ = self.place(rank, 100)
            pen.line([(x, self.upper), (x, self.lower + 5)], _GRID, 1)
            pen.text((x, self.lower + 10), str(rank), anchor="ma")
        corner = (self.left, self.lower)
        pen.line([(self.left, self.upper), corner, (self.right, self.lower)], _INK, 1)
        pen.text(((self.left + self.right) / 2, self.lower + 30), "rank", anchor="ma")
        pen.text((self.left - 10, self.upper - 14), "%", anchor="rm")

    def _ticks(self) -> list[int]:
        step = next(step for step in (1, 5, 10, 20, 50, 100, self.num_ranks) if self.num_ranks <= 12 * step)
        return [1, *(rank for rank in range(step, self.num_ranks + 1, step) if rank > 1)]


class _Pen:
    """Draws on an oversized image in the coordinates of the reduced one."""

    def __init__(self, image: Image.Image) -> None:
        self._draw = ImageDraw.Draw(image)

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, width: float) -> None:
        scaled = [(x * _OVERSIZE, y * _OVERSIZE) for x, y in points]
        self._draw.line(scaled, fill=colour, width=round(width * _OVERSIZE), joint="curve")

    def dots(self, points: Sequence[tuple[float, float]], colour: Colour, radius: float) -> None:
        for x, y in points:
            box = [
                (x - radius) * _OVERSIZE,
                (y - radius) * _OVERSIZE,
                (x + radius) * _OVERSIZE,
                (y + radius) * _OVERSIZE,
            ]
            self._draw.ellipse(box, fill=colour)

    def box(self, corners: tuple[float, float, float, float], colour: Colour) -> None:
        self._draw.rectangle([_OVERSIZE * place for place in corners], fill=colour)

    def width(self, words: str) -> float:
        return _width(words, _LABEL * _OVERSIZE) / _OVERSIZE

    def text(self, place: tuple[float, float], words: str, *, size: int = _LABEL, anchor: str) -> None:
        x, y = place
        _write(self._draw, (x * _OVERSIZE, y * _OVERSIZE), words, size=size * _OVERSIZE, anchor=anchor)


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    words: str,
    *,
    size: int = _TEXT,
    fill: Colour = _INK,
    anchor: str = "la",
) -> None:
    draw.text(place, _plain(words), font=_font(size), fill=fill, anchor=anchor)


def _width(words: str, size: int) -> int:
    return math.ceil(_font(size).getlength(_plain(words)))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _plain(words: str) -> str:
    """On one line, in the letters that PIL's own font has."""
    return " ".join(words.split()).encode("ascii", "replace").decode()


def pixels_of(image: Image.Image) -> NDArray[np.uint8]:
    """An image of any kind as uint8 [H, W, 3], no larger than rankings show it: many fit into memory at once."""
    # PIL warns when a palette with transparency becomes RGB at once.
    colours = image.convert("RGBA").convert("RGB")
    return np.asarray(colours.resize(_size_of(image.width, image.height, _IMAGE_HEIGHT), Image.Resampling.BICUBIC))


def _fitted(image: NDArray[np.uint8], height: int) -> Image.Image:
    whole = Image.fromarray(image)
    return whole.resize(_size_of(whole.width, whole.height, height), Image.Resampling.BICUBIC)


def _size_of(width: int, height: int, wanted: int) -> tuple[int, int]:
    """Width and height of an image as high as wanted, but at most twice as wide."""
    scale = wanted / max(height, width / 2)
    return max(round(width * scale), 1), max(round(height * scale), 1)
