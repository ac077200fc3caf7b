"""Pictures of batches, ranked galleries and CMC curves."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import accumulate, groupby

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

logger = logging.getLogger(__name__)

Color = tuple[int, int, int]

# The brightness differs too, for readers to whom red and green look alike.
RIGHT: Color = (40, 185, 90)
WRONG: Color = (190, 25, 35)
QUERY: Color = (40, 90, 200)
SAME_CAMERA: Color = (250, 190, 0)
_NO_IMAGE: Color = (224, 224, 224)
_PAPER: Color = (255, 255, 255)
_INK: Color = (30, 30, 30)
_GREY: Color = (110, 110, 110)

_MARGIN = 16
_TITLE, _TEXT = 18, 12  # font sizes
_LINE = 16  # height of a line of text
_FRAME, _RING, _GAP = 4, 2, 6  # the ring is between the frame and the image
_IMAGE_HEIGHT = 168  # of an image in a ranking
_LEAST_WIDTH = 76  # "cos -0.83" fits below an image
_BATCH_HEIGHT, _BATCH_WIDTH = 128, 1120  # of an image, and of the complete grid


@dataclass(frozen=True)
class GalleryCell:
    """An image of a ranked gallery and its caption.

    Attributes:
        image: uint8 [H, W, 3], or None if it cannot be read.
        lines: Lines of text below the image.
        same_camera: Whether the image is from the query's camera, which a yellow ring shows.
    """

    image: NDArray[np.uint8] | None
    lines: tuple[str, ...]
    same_camera: bool = False


def denormalize(images: NDArray[np.floating], mean: Sequence[float], std: Sequence[float]) -> NDArray[np.uint8]:
    """Return the pixels of a normalized model input [B, 3, H, W]: uint8 [B, H, W, 3]."""
    pixels = images.transpose(0, 2, 3, 1) * np.asarray(std) + np.asarray(mean)
    rounded: NDArray[np.uint8] = np.rint(pixels * 255).clip(0, 255).astype(np.uint8)
    return rounded


def ranked_gallery(query: GalleryCell, matches: Sequence[GalleryCell], is_match: Sequence[bool | None]) -> Image.Image:
    """Draw a query and its gallery images, nearest first.

    Args:
        query: Query image, which gets a blue frame.
        matches: Gallery images, without those that the protocol leaves out.
        is_match: True for a green frame, False for a red one, None (identity unknown) for no frame.
    """
    frames = [QUERY, *(None if match is None else RIGHT if match else WRONG for match in is_match)]
    heads = ["query", *map(str, range(1, len(matches) + 1))]
    cells = [_cell(*parts) for parts in zip([query, *matches], heads, frames, strict=True)]
    return _joined(cells, [3 * _GAP] + [_GAP] * len(matches))  # a wider gap after the query


def _joined(images: Sequence[Image.Image], gaps: Sequence[int]) -> Image.Image:
    """Join images to a row, with a gap after each but the last."""
    starts = [0, *accumulate(image.width + gap for image, gap in zip(images, gaps, strict=True))]
    row = Image.new("RGB", (starts[-1] - gaps[-1], max(image.height for image in images)), _PAPER)
    for image, left in zip(images, starts, strict=False):
        row.paste(image, (left, 0))
    return row


def _cell(cell: GalleryCell, head: str, frame: Color | None) -> Image.Image:
    image = _no_image() if cell.image is None else _fitted(cell.image, _IMAGE_HEIGHT)
    width = max(image.width + 2 * _FRAME, _LEAST_WIDTH)
    top = _LINE + 2
    canvas = Image.new("RGB", (width, top + image.height + 2 * _FRAME + 4 + _LINE * len(cell.lines)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    left = (width - image.width) // 2
    if frame is not None:
        box = (left - _FRAME, top, left + image.width + _FRAME - 1, top + image.height + 2 * _FRAME - 1)
        draw.rectangle(box, fill=frame)
    if cell.same_camera:
        inner = _FRAME - _RING
        box = (left - _RING, top + inner, left + image.width + _RING - 1, top + image.height + _FRAME + _RING - 1)
        draw.rectangle(box, fill=SAME_CAMERA)
    canvas.paste(image, (left, top + _FRAME))
    _write(draw, (width // 2, 0), head, fill=_GREY, anchor="ma")
    for number, line in enumerate(cell.lines):
        _write(draw, (width // 2, top + image.height + 2 * _FRAME + 4 + _LINE * number), line, anchor="ma")
    return canvas


def _no_image() -> Image.Image:
    image = Image.new("RGB", (_IMAGE_HEIGHT // 2, _IMAGE_HEIGHT), _NO_IMAGE)
    _write(ImageDraw.Draw(image), (_IMAGE_HEIGHT // 4, _IMAGE_HEIGHT // 2), "not readable", anchor="mm")
    return image


def sheet(rows: Sequence[Image.Image], title: str, note: str = "") -> Image.Image:
    """Arrange rows below each other, under a title and a note."""
    width = max([row.width for row in rows] + [_width(title, _TITLE), _width(note, _TEXT)])
    top = _MARGIN + _TITLE + 8 + (_LINE if note else 0) + 10
    height = top + sum(row.height + _MARGIN for row in rows)
    page = Image.new("RGB", (width + 2 * _MARGIN, height), _PAPER)
    draw = ImageDraw.Draw(page)
    _write(draw, (_MARGIN, _MARGIN), title, size=_TITLE)
    _write(draw, (_MARGIN, _MARGIN + _TITLE + 8), note, fill=_GREY)
    for row in rows:
        page.paste(row, (_MARGIN, top))
        top += row.height + _MARGIN
    return page


def batch_grid(images: NDArray[np.uint8], pids: Sequence[int], title: str, note: str = "") -> Image.Image:
    """Draw the images of a batch; consecutive images of one identity form a group under its pid.

    Args:
        images: uint8 [B, H, W, 3].
        pids: [B].
        title: Title of the picture.
        note: Line below the title.
    """
    fitted = iter([_fitted(image, _BATCH_HEIGHT) for image in images])
    groups = [_group([next(fitted) for _ in same], f"pid {pid}") for pid, same in groupby(pids)]
    num_columns = max(1, _BATCH_WIDTH // (max(group.width for group in groups) + _MARGIN))
    rows = [groups[start : start + num_columns] for start in range(0, len(groups), num_columns)]
    return sheet([_joined(row, [_MARGIN] * len(row)) for row in rows], title, note)


def _group(images: Sequence[Image.Image], head: str) -> Image.Image:
    row = _joined(images, [2] * len(images))
    group = Image.new("RGB", (max(row.width, _width(head, _TEXT)), _LINE + row.height), _PAPER)
    _write(ImageDraw.Draw(group), (0, 0), head)
    group.paste(row, (0, _LINE))
    return group


def cmc_chart(curves: Mapping[str, Sequence[float]], title: str) -> Image.Image | None:
    """Draw CMC curves: the percentage of queries with a match among the first k images, over k.

    Args:
        curves: Fractions for rank 1, 2 and so on, by the name of the curve.
        title: Title of the chart.

    Returns:
        The chart, or None if matplotlib is not installed.
    """
    if not _has_matplotlib():
        return None
    import matplotlib  # optional, and imported only for this, as it takes half a second
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False}):  # a name may hold $
        figure = Figure(figsize=(7.6, 4.8), dpi=100, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel="rank", ylabel="queries with a match, %")
        axes.set_title(_plain(title), loc="left", wrap=True)
        axes.grid(color="0.9")
        for name, curve in curves.items():
            marker = "." if len(curve) <= 60 else ""
            axes.plot(range(1, len(curve) + 1), [100 * y for y in curve], marker=marker, label=_plain(name))
        lowest = min(min(curve) for curve in curves.values())
        axes.set_ylim(min(math.floor(10 * lowest) * 10, 90), 101)
        axes.legend(loc="lower right")
        canvas.draw()  # type: ignore[no-untyped-call]
        pixels = np.array(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
        return Image.fromarray(pixels).convert("RGB")


@cache
def _has_matplotlib() -> bool:
    """Return whether matplotlib is installed; the first call logs if it is not."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns that it builds a cache of fonts
    is_installed = find_spec("matplotlib") is not None
    if not is_installed:
        logger.info("CMC charts are not drawn: matplotlib is not installed. Fix: uv sync --extra plots")
    return is_installed


def _write(
    draw: ImageDraw.ImageDraw,
    position: tuple[float, float],
    text: str,
    *,
    size: int = _TEXT,
    fill: Color = _INK,
    anchor: str = "la",
) -> None:
    draw.text(position, _plain(text), font=_font(size), fill=fill, anchor=anchor)


def _width(text: str, size: int) -> int:
    return math.ceil(_font(size).getlength(_plain(text)))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _plain(text: str) -> str:
    """Return the text on one line, in ASCII, as PIL's default font has no other letters."""
    return " ".join(text.split()).encode("ascii", "replace").decode()


def pixels_of(image: Image.Image) -> NDArray[np.uint8]:
    """Return an image of any mode as uint8 [H, W, 3], reduced to its size in a ranking to save memory."""
    # PIL warns when a palette with transparency is converted to RGB directly.
    rgb = image.convert("RGBA").convert("RGB")
    return np.asarray(rgb.resize(_size_of(image.width, image.height, _IMAGE_HEIGHT), Image.Resampling.BICUBIC))


def _fitted(image: NDArray[np.uint8], height: int) -> Image.Image:
    full = Image.fromarray(image)
    return full.resize(_size_of(full.width, full.height, height), Image.Resampling.BICUBIC)


def _size_of(width: int, height: int, wanted: int) -> tuple[int, int]:
    """Return width and height of an image scaled to the wanted height, but at most to twice that width."""
    scale = wanted / max(height, width / 2)
    return max(round(width * scale), 1), max(round(height * scale), 1)
