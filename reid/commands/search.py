"""The command `search`: the gallery images nearest to given images, as a table, JSON and a picture."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

from reid.checkpoints import weights
from reid.checkpoints.recorded_settings import settings_in
from reid.checkpoints.trained import load_trained
from reid.config.load import as_plain_dict
from reid.config.parsing import RawSetting, example
from reid.data.benchmarks.splits import DISTRACTOR_PID, JUNK_PID
from reid.errors import DataError, SettingsError, WorldError
from reid.evaluation.drawing import GalleryCell, pixels_of, ranked_gallery, sheet
from reid.evaluation.embedder import ImageEmbedder
from reid.evaluation.gallery import Gallery, GalleryImage, Metadata, read_gallery, read_metadata
from reid.process.files import atomic_write, printable, write_text
from reid.process.signals import Signals
from reid.process.text_tables import format_table
from reid.retrieval.neighbours import nearest_in_gallery

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

logger = logging.getLogger(__name__)

_LEGEND = "green: the same person, red: another one, no frame: unknown; yellow ring: the query's camera"
_MOST_ROWS, _MOST_COLUMNS = 100, 50  # limits of the picture, as a JPEG has at most 65,535 pixels each way


class Match(NamedTuple):
    """Gallery image returned for a query."""

    number: int  # rank from 1, nearest first
    measure: float  # cosine similarity or Euclidean distance
    image: GalleryImage
    is_match: bool | None  # None if a file name does not state the identity
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
    **command_args: str | None,
) -> None:
    """Write the nearest gallery images of each given image; runs in one process.

    Args:
        cfg: Settings that the gallery was made with.
        accelerator: Accelerator used for autocast.
        signals: Received signals; unused, as there is nothing to save.
        images: Query image files.
        gallery: Folder of the gallery.
        top: Number of gallery images for each query.
        output: File of the picture.
        command_args: With "json", the file of the JSON report, or None.

    Raises:
        DataError: The gallery is damaged, or an image cannot be read.
        SettingsError: A setting differs from the gallery's.
        WorldError: TEST.WEIGHT holds other weights than those that the gallery was made with.
    """
    del signals
    opened = read_gallery(Path(gallery))
    metadata = opened.metadata
    _validate_settings(cfg, metadata, f"--gallery {gallery}")
    trained = load_trained(cfg, accelerator)
    if trained.checksum != metadata.checksum:
        raise WorldError(
            f"{trained.source} must hold the weights of the gallery {gallery} (checksum {metadata.checksum}), got "
            f"{trained.checksum}. Fix: give the file of those weights, or make the gallery again.",
            key="TEST.WEIGHT",
        )
    queries = _embed_queries(ImageEmbedder(trained.model, accelerator, cfg), images)
    distances, positions = nearest_in_gallery(
        queries, torch.from_numpy(opened.embedding), top, distance=metadata.distance
    )
    measures = 1 - distances.double() if metadata.distance == "cosine" else distances
    results = [_matches(*row, opened) for row in zip(images, measures.tolist(), positions.tolist(), strict=True)]
    for image, matches in zip(images, results, strict=True):
        logger.info("%s", _table(image, matches, metadata))
    if command_args["json"]:
        report = _report(images, results, metadata)
        write_text(Path(command_args["json"]), json.dumps(report, indent=2) + "\n", key="--json")
    picture = _draw(images, results, metadata)
    with atomic_write(Path(output), key="--output") as temporary:
        picture.save(temporary)
    left_out = len(images) > _MOST_ROWS or top > _MOST_COLUMNS
    limits = f" (only the first {_MOST_ROWS} images, with {_MOST_COLUMNS} matches each)" if left_out else ""
    logger.info("picture written to %s%s", output, limits)


def recorded_settings(cfg: CfgNode, command_args: dict[str, Any]) -> list[RawSetting]:
    """Return the settings that the gallery was made with, including its TEST.WEIGHT."""
    del cfg
    folder = command_args["gallery"]
    return settings_in(read_metadata(Path(folder)).config, f"--gallery {folder}", key="--gallery")


def _validate_settings(cfg: CfgNode, metadata: Metadata, source: str) -> None:
    """Reject settings that change the embeddings; those of the machine may differ."""
    weights.verify_settings({"config": metadata.config}, cfg, source, key="--gallery")
    made_with, used_with = yaml.safe_load(metadata.config), as_plain_dict(cfg)
    for key in ("INPUT.SIZE_TEST", "TEST.NECK_FEAT", "TEST.FEAT_NORM", "TEST.FLIP"):
        section, name = key.split(".")
        before, now = made_with[section][name], used_with[section][name]
        if before != now:
            raise SettingsError(
                f"{key} must be {example(before)} as in {source}, got {example(now)}. Fix: leave it out.", key=key
            )


def _embed_queries(embedder: ImageEmbedder, images: Sequence[str]) -> torch.Tensor:
    rows = embedder.embed([Path(image) for image in images])
    if rows.unreadable:
        bad = ", ".join(f"{images[index]} ({reason})" for index, reason in sorted(rows.unreadable.items()))
        raise DataError(
            f"every IMAGE must be readable, got {len(rows.unreadable)} of {len(images)} that are not: {bad}. Fix: omit "
            "them.",
            key="IMAGE",
        )
    return rows.embedding.float().cpu()


def _matches(query: str, measures: list[float], positions: list[int], gallery: Gallery) -> list[Match]:
    """Return the matches of one query, with the identity and camera that the file names state."""
    query_image = GalleryImage.of(Path(query).name)
    matches = []
    for number, (measure, position) in enumerate(zip(measures, positions, strict=True), start=1):
        image = gallery.images[position]
        is_match = None
        if (query_image.pid or 0) > DISTRACTOR_PID and image.pid is not None and image.pid != JUNK_PID:
            is_match = image.pid == query_image.pid
        same_camera = query_image.camid is not None and image.camid == query_image.camid
        matches.append(Match(number, measure, image, is_match, same_camera))
    return matches


def _name_of_measure(metadata: Metadata) -> str:
    return "similarity" if metadata.distance == "cosine" else "distance"


def _table(query: str, matches: Sequence[Match], metadata: Metadata) -> str:
    rows = [["rank", _name_of_measure(metadata), "image"]]
    for match in matches:
        remarks = ", ".join(_remarks(match))
        path = printable(match.image.path) + (f" ({remarks})" if remarks else "")
        rows.append([str(match.number), f"{match.measure:.4f}", path])
    return f"{printable(query)}\n{format_table(rows, '>><')}"


def _remarks(match: Match) -> list[str]:
    verdict = {True: "match", False: "other", None: ""}[match.is_match]
    return [remark for remark in (verdict, "same camera" if match.same_camera else "") if remark]


def _report(images: Sequence[str], results: Sequence[Sequence[Match]], metadata: Metadata) -> dict[str, Any]:
    measure = _name_of_measure(metadata)

    def entry(match: Match) -> dict[str, Any]:
        verdict = {"match": match.is_match, "same_camera": match.same_camera}
        return {"rank": match.number, measure: match.measure, **match.image._asdict(), **verdict}

    return {
        **{name: getattr(metadata, name) for name in ("folder", "weight", "checksum")},
        "measure": measure,
        "results": [
            {"image": image, "found": [entry(match) for match in matches]}
            for image, matches in zip(images, results, strict=True)
        ],
    }


def _draw(images: Sequence[str], results: Sequence[Sequence[Match]], metadata: Metadata) -> Image.Image:
    rows = []
    for query, matches in zip(images[:_MOST_ROWS], results, strict=False):
        cells = [_cell(match, metadata) for match in matches[:_MOST_COLUMNS]]
        rows.append(ranked_gallery(GalleryCell(_pixels(Path(query)), ()), cells, [match.is_match for match in matches]))
    return sheet(rows, f"the nearest images in {Path(metadata.folder).name}", _LEGEND)


def _cell(match: Match, metadata: Metadata) -> GalleryCell:
    lines = (f"{match.measure:.4f}", *_remarks(match))
    return GalleryCell(_pixels(Path(metadata.folder, match.image.path)), lines, match.same_camera)


def _pixels(file: Path) -> NDArray[np.uint8] | None:
    """Return the pixels to draw, or None if the image is missing or damaged."""
    try:
        with Image.open(file) as image:
            return pixels_of(image)
    except Exception:  # a broken file makes PIL's decoders raise nearly anything
        return None
