"""Embeddings of image files, and the story of a folder that becomes a gallery, on all ranks."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from tqdm import tqdm

from reid.checkpoints.trained import TrainedModel, load_trained
from reid.commands.gallery import EmbeddingFile, Metadata, write_gallery, write_unreadable, writing_embeddings
from reid.config.load import dump
from reid.data.benchmarks.splits import IMAGE_SUFFIXES
from reid.distributed import collectives
from reid.distributed.watchdog import Watchdog
from reid.errors import DataError
from reid.evaluation.embedder import ImageEmbedder, distance_of
from reid.process.files import printable
from reid.process.signals import Signals

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

logger = logging.getLogger(__name__)

T = TypeVar("T")

SUFFIXES = IMAGE_SUFFIXES | {".webp"}

_BATCHES_PER_ROUND = 64  # embedded by all ranks, then gathered and written: what is in memory at any time
_AHEAD = 2  # batches that are decoded while one is embedded
_NUM_SHOWN = 5  # unreadable images in a message


def embed(
    cfg: CfgNode, accelerator: Accelerator, signals: Signals, *, folder: str, output: str | None, strict: bool
) -> None:
    """Writes the embeddings of all images in a folder; called by all ranks, the same files for any number of them.

    Args:
        cfg: the whole configuration.
        accelerator: whose precision is used.
        signals: there is nothing to save: the first one ends it.
        folder: of images, with all folders in it.
        output: the gallery's folder; by default in OUTPUT_DIR.
        strict: whether an image that cannot be read is an error, and not left out.

    Raises:
        DataError: the folder has no images that can be read.
        WorldError: the checkpoint does not fit, or the gallery cannot be written.
        FloatingPointError: an embedding is not finite.
    """
    del signals
    root = Path(folder)
    with collectives.errors_shared():
        names = list_images(root)
    collectives.require_same_on_all_ranks(
        {f"the images in {folder}": hashlib.sha256(os.fsencode("\0".join(names))).hexdigest()}, key="FOLDER"
    )
    trained = load_trained(cfg, accelerator)
    out = Path(output) if output else Path(cfg.OUTPUT_DIR) / "galleries" / root.resolve().name
    watchdog = Watchdog(cfg.SOLVER.TIMEOUT_MINUTES)
    embedder = ImageEmbedder(trained.model, accelerator, cfg, beat=watchdog.beat)
    start = time.monotonic()
    with ExitStack() as files, watchdog.watching():
        file = _on_rank_zero(lambda: files.enter_context(writing_embeddings(out, trained.model.num_features)))
        unreadable = _embed_all(embedder, root, names, file)
        _on_rank_zero(lambda: _report_unreadable(out, folder, names, unreadable, strict=strict))
        _on_rank_zero(files.close)
    readable = [name for place, name in enumerate(names) if place not in unreadable]
    metadata = _metadata(cfg, trained, root, len(readable), len(unreadable))
    _on_rank_zero(lambda: write_gallery(out, readable, metadata))
    seconds = time.monotonic() - start
    logger.info("%s: %d images in %.1f s (%.0f images/s)", out, len(readable), seconds, len(names) / seconds)


def list_images(root: Path) -> list[str]:
    """The images in a folder and all folders in it: their paths below it, with slashes, sorted.

    Hidden files and folders are left out; a folder that several links lead to is entered once.

    Raises:
        DataError: there is no such folder, it holds no images, or one in it may not be listed.
    """

    def fail(error: OSError) -> NoReturn:
        raise DataError(
            f"FOLDER must be a folder of images that can be read, got {error.filename} ({error.strerror}); correct the "
            "path or its permissions",
            key="FOLDER",
        ) from error

    found, entered = [], set()
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        here = os.path.relpath(folder, root)
        entered.add(os.path.realpath(folder))
        folders[:] = [name for name in sorted(folders) if not name.startswith(".")]
        folders[:] = [name for name in folders if os.path.realpath(Path(folder, name)) not in entered]
        images = [name for name in files if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")]
        found += [Path(here, name).as_posix() for name in images]
    if not found:
        raise DataError(
            f"{root} must hold images ({', '.join(sorted(SUFFIXES))}), but has none; give another FOLDER", key="FOLDER"
        )
    return sorted(found)


def _on_rank_zero(work: Callable[[], T]) -> T | None:
    """Runs the work on rank 0; its errors reach all ranks."""
    with collectives.errors_shared():
        return work() if collectives.is_main() else None


def _embed_all(embedder: ImageEmbedder, root: Path, names: Sequence[str], file: EmbeddingFile | None) -> dict[int, str]:
    """Writes the embeddings of all images that can be read; returns position -> reason of the others."""
    num_images = _BATCHES_PER_ROUND * embedder.batch_size
    unreadable: dict[int, str] = {}
    is_shown = collectives.is_main() and sys.stderr.isatty()
    with tqdm(total=len(names), desc=str(root), unit="img", disable=not is_shown) as bar:
        for start in range(0, len(names), num_images):
            part = names[start : start + num_images]
            rows = embedder.embed([root / name for name in part])
            unreadable |= {start + place: reason for place, reason in rows.unreadable.items()}
            readable = rows.readable().float().cpu().numpy()
            with collectives.errors_shared():
                if file:
                    file.append(readable)
            bar.update(len(part))
    return unreadable


def _report_unreadable(
    out: Path, folder: str, names: Sequence[str], unreadable: dict[int, str], *, strict: bool
) -> None:
    lines = [f"{names[place]} ({unreadable[place]})" for place in sorted(unreadable)]
    file = write_unreadable(out, lines)
    if not lines:
        return
    shown = printable(", ".join(lines[:_NUM_SHOWN]))
    more = f" and {len(lines) - _NUM_SHOWN} more" if len(lines) > _NUM_SHOWN else ""
    words = f"{len(lines)} of {len(names)} images in {folder} cannot be read: {shown}{more}, all listed in {file}"
    if strict or len(lines) == len(names):
        raise DataError(
            f"{words}; copy them again or remove them{', or leave --strict out' if strict else ''}", key="FOLDER"
        )
    logger.warning("warning: %s; they are left out", words)


def _metadata(cfg: CfgNode, trained: TrainedModel, root: Path, num_images: int, num_unreadable: int) -> Metadata:
    weight = str(trained.file.resolve())
    settings = cfg.clone()
    settings.defrost()
    settings.TEST.WEIGHT = weight  # found from any folder
    return Metadata(
        folder=str(root.resolve()),
        num_images=num_images,
        num_features=trained.model.num_features,
        num_unreadable=num_unreadable,
        distance=distance_of(cfg),
        normalised=bool(cfg.TEST.FEAT_NORM),
        weight=weight,
        checksum=trained.checksum,
        config=dump(settings),
    )
