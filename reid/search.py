"""The story of a search: images in, the nearest ones of a gallery out, as a table, JSON and a picture."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from reid import weights
from reid.config.load import as_plain_dict
from reid.config.parsing import example
from reid.data.splits import DISTRACTOR_PID, JUNK_PID
from reid.embedder import ImageEmbedder
from reid.errors import DataError, SettingsError, WorldError
from reid.gallery import Facts, Gallery, GalleryImage, read_gallery
from reid.nearest import nearest
from reid.pictures import Shown, pixels_of, ranked_gallery, sheet
from reid.preemption import Signals
from reid.process.files import atomic_write, printable, write_text
from reid.trained import load_trained

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

logger = logging.getLogger("reid.search")

_LEGEND = "green: the same person, red: another one, no frame: nobody knows; yellow ring: the query's camera"
_MOST_ROWS, _MOST_COLUMNS = 100, 50  # of the picture; a JPEG has at most 65,535 pixels each way


class Found(NamedTuple):
    """One gallery image for one query."""

    number: int  # from 1, the nearest first
    distance: float
    image: GalleryImage
    is_match: bool | None  # None where nobody knows
    same_camera: bool


def search(
    cfg: CfgNode,
    accelerator: Accelerator,
    signals: Signals,
    *,
    images: list[str],
    gallery: str,
    top: int,
    output: str,
    **own: str | None,
) -> None:
    """Finds the nearest images of a gallery; one process.

    Args:
        cfg: the settings that the gallery was made with.
        accelerator: whose precision is used.
        signals: there is nothing to save: the first one ends it.
        images: files to look for.
        gallery: its folder.
        top: how many to find for each.
        output: the picture.
        own: `json`, the file of results for programs, if there is to be one.

    Raises:
        DataError: the gallery is damaged, or an image cannot be read.
        SettingsError: a setting is not the gallery's.
        WorldError: TEST.WEIGHT has other weights than those that the gallery was made with.
    """
    del signals
    opened = read_gallery(Path(gallery))
    _check_settings(cfg, opened.facts, f"--gallery {gallery}")
    trained = load_trained(cfg, accelerator)
    if trained.checksum != opened.facts.checksum:
        raise WorldError(
            f"{trained.source} must hold the weights that the gallery {gallery} was made with (checksum "
            f"{opened.facts.checksum}), but holds others ({trained.checksum}); give that file, or make the gallery "
            "anew",
            key="TEST.WEIGHT",
        )
    queries = _embed_queries(ImageEmbedder(trained.model, accelerator, cfg), images)
    distances, places = nearest(
        queries,
        opened.embedding,
        top,
        distance=opened.facts.distance,
        use_faiss=find_spec("faiss") is not None,
    )
    results = [_judge(*row, opened) for row in zip(images, distances, places, strict=True)]
    for image, found in zip(images, results, strict=True):
        logger.info("%s", _table(image, found, opened.facts))
    if own["json"]:
        report = _report(images, results, opened.facts)
        write_text(Path(own["json"]), json.dumps(report, indent=2) + "\n", key="--json")
    picture = _draw(images, results, opened.facts)
    with atomic_write(Path(output), key="--output") as temporary:
        picture.save(temporary)
    left_out = len(images) > _MOST_ROWS or top > _MOST_COLUMNS
    limits = f" (of the first {_MOST_ROWS} images, and {_MOST_COLUMNS} for each)" if left_out else ""
    logger.info("drawn in %s%s", output, limits)


def _check_settings(cfg: CfgNode, facts: Facts, source: str) -> None:
    """The command line may say where and how to compute, but not what."""
    weights.check_settings({"config": facts.config}, cfg, source, key="--gallery")
    made_with, used_with = yaml.safe_load(facts.config), as_plain_dict(cfg)
    for key in ("INPUT.SIZE_TEST", "TEST.NECK_FEAT", "TEST.FEAT_NORM", "TEST.FLIP"):
        section, name = key.split(".")
        before, now = made_with[section][name], used_with[section][name]
        if before != now:
            raise SettingsError(
                f"{key} must be {example(before)} as in {source}, got {example(now)}; leave it out", key=key
            )


def _embed_queries(embedder: ImageEmbedder, images: Sequence[str]) -> NDArray[np.float32]:
    rows = embedder.embed([Path(image) for image in images])
    if rows.unreadable:
        bad = ", ".join(f"{images[place]} ({reason})" for place, reason in sorted(rows.unreadable.items()))
        raise DataError(
            f"every IMAGE must be readable, but {len(rows.unreadable)} of {len(images)} are not: {bad}; leave them out",
            key="IMAGE",
        )
    return rows.embedding.float().cpu().numpy()


def _judge(query: str, distances: NDArray[np.float64], places: NDArray[np.int64], gallery: Gallery) -> list[Found]:
    """What was found for one query, and whether it is right, as far as the file names tell."""
    sought = GalleryImage.of(Path(query).name)
    found = []
    for number, (distance, place) in enumerate(zip(distances.tolist(), places.tolist(), strict=True), start=1):
        image = gallery.images[place]
        is_match = None
        if sought.pid is not None and sought.pid > DISTRACTOR_PID and image.pid is not None and image.pid != JUNK_PID:
            is_match = image.pid == sought.pid
        same_camera = sought.camid is not None and image.camid == sought.camid
        found.append(Found(number, distance, image, is_match, same_camera))
    return found


def _measure(distance: float, facts: Facts) -> float:
    """As it is shown: the cosine, or the Euclidean distance."""
    return 1 - distance if facts.distance == "cosine" else distance


def _name_of_measure(facts: Facts) -> str:
    return "similarity" if facts.distance == "cosine" else "distance"


def _table(query: str, found: Sequence[Found], facts: Facts) -> str:
    lines = [printable(query), f"{'rank':>6}{_name_of_measure(facts):>12}  image"]
    for one in found:
        remarks = ", ".join(_remarks(one))
        remark = f" ({remarks})" if remarks else ""
        lines.append(f"{one.number:>6}{_measure(one.distance, facts):>12.4f}  {printable(one.image.path)}{remark}")
    return "\n".join(lines)


def _remarks(one: Found) -> list[str]:
    """What is known of it."""
    verdict = {True: "match", False: "other", None: ""}[one.is_match]
    return [words for words in (verdict, "same camera" if one.same_camera else "") if words]


def _report(images: Sequence[str], results: Sequence[Sequence[Found]], facts: Facts) -> dict[str, Any]:
    return {
        "folder": facts.folder,
        "weight": facts.weight,
        "checksum": facts.checksum,
        "measure": _name_of_measure(facts),
        "results": [
            {
                "image": image,
                "found": [
                    {
                        "rank": one.number,
                        _name_of_measure(facts): _measure(one.distance, facts),
                        **one.image._asdict(),
                        "match": one.is_match,
                        "same_camera": one.same_camera,
                    }
                    for one in found
                ],
            }
            for image, found in zip(images, results, strict=True)
        ],
    }


def _draw(images: Sequence[str], results: Sequence[Sequence[Found]], facts: Facts) -> Image.Image:
    rows = []
    for query, found in zip(images[:_MOST_ROWS], results, strict=False):
        shown = [_shown(one, facts) for one in found[:_MOST_COLUMNS]]
        rows.append(ranked_gallery(Shown(_pixels(Path(query)), ()), shown, [one.is_match for one in found]))
    return sheet(rows, f"the nearest images in {Path(facts.folder).name}", _LEGEND)


def _shown(one: Found, facts: Facts) -> Shown:
    lines = (f"{_measure(one.distance, facts):.4f}", *_remarks(one))
    return Shown(_pixels(Path(facts.folder, one.image.path)), lines, one.same_camera)


def _pixels(file: Path) -> NDArray[np.uint8] | None:
    """Those that are drawn; None where the image is gone or damaged."""
    try:
        with Image.open(file) as image:
            return pixels_of(image)
    except Exception:  # a broken file makes PIL's decoders raise nearly anything
        return None
