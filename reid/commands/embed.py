"""The command `embed`: turn a folder of images into a gallery of embeddings, on all ranks."""

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
from reid.config.load import dump
from reid.data.benchmarks.splits import IMAGE_SUFFIXES, shown
from reid.distributed import collectives
from reid.distributed.watchdog import Watchdog
from reid.errors import DataError
from reid.evaluation.embedder import ImageEmbedder, distance_of
from reid.evaluation.gallery import EmbeddingFile, Metadata, write_gallery, write_unreadable, writing_embeddings
from reid.process.signals import Signals

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

logger = logging.getLogger(__name__)

T = TypeVar("T")

SUFFIXES = IMAGE_SUFFIXES | {".webp"}

_BATCHES_PER_ROUND = 64  # embedded by all ranks, then gathered and written; limits the memory in use


def embed(
    cfg: CfgNode, accelerator: Accelerator, signals: Signals, *, folder: str, output: str | None, strict: bool
) -> None:
    """Write the embeddings of all images in a folder; called by all ranks, whose number does not change the files.

    Args:
        cfg: All settings.
        accelerator: Accelerator used for autocast.
        signals: Received signals; unused, as there is nothing to save.
        folder: Folder of images, searched recursively.
        output: Folder of the gallery; None for OUTPUT_DIR/galleries/FOLDER.
        strict: Whether an unreadable image is an error instead of being left out.

    Raises:
        DataError: The folder has no readable image.
        WorldError: The checkpoint does not fit, or the gallery cannot be written.
        NonFiniteError: An embedding is not finite.
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
    readable = [name for index, name in enumerate(names) if index not in unreadable]
    metadata = _metadata(cfg, trained, root, len(readable), len(unreadable))
    _on_rank_zero(lambda: write_gallery(out, readable, metadata))
    seconds = time.monotonic() - start
    logger.info("%s: %d images in %.1f s (%.0f images/s)", out, len(readable), seconds, len(names) / seconds)


def list_images(root: Path) -> list[str]:
    """Return the images in a folder, recursively: sorted paths relative to the folder, with slashes.

    Hidden files and folders are left out. A folder that several links lead to is entered once.

    Raises:
        DataError: The folder is missing or holds no images, or a folder in it cannot be listed.
    """

    def fail(error: OSError) -> NoReturn:
        raise DataError(
            f"FOLDER must be a readable folder of images, got {error.filename} ({error.strerror}). Fix: correct the "
            "path or its permissions.",
            key="FOLDER",
        ) from error

    names, entered = [], set()
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        relative = os.path.relpath(folder, root)
        entered.add(os.path.realpath(folder))
        folders[:] = [name for name in sorted(folders) if not name.startswith(".")]
        folders[:] = [name for name in folders if os.path.realpath(Path(folder, name)) not in entered]
        images = [name for name in files if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")]
        names += [Path(relative, name).as_posix() for name in images]
    if not names:
        raise DataError(
            f"FOLDER must hold images ({', '.join(sorted(SUFFIXES))}), got {root} without any. Fix: give another one.",
            key="FOLDER",
        )
    return sorted(names)


def _on_rank_zero(work: Callable[[], T]) -> T | None:
    """Run the work on rank 0; unlike `collectives.from_rank_zero`, share only its errors, not its result."""
    with collectives.errors_shared():
        return work() if collectives.is_main() else None


def _embed_all(embedder: ImageEmbedder, root: Path, names: Sequence[str], file: EmbeddingFile | None) -> dict[int, str]:
    """Write the embeddings of the readable images; return index -> reason of the others."""
    num_images = _BATCHES_PER_ROUND * embedder.batch_size
    unreadable: dict[int, str] = {}
    is_shown = collectives.is_main() and sys.stderr.isatty()
    with tqdm(total=len(names), desc=str(root), unit="img", disable=not is_shown) as bar:
        for start in range(0, len(names), num_images):
            part = names[start : start + num_images]
            rows = embedder.embed([root / name for name in part])
            unreadable |= {start + index: reason for index, reason in rows.unreadable.items()}
            readable = rows.readable().float().cpu().numpy()
            with collectives.errors_shared():
                if file:
                    file.append(readable)
            bar.update(len(part))
    return unreadable


def _report_unreadable(
    out: Path, folder: str, names: Sequence[str], unreadable: dict[int, str], *, strict: bool
) -> None:
    lines = [f"{names[index]} ({unreadable[index]})" for index in sorted(unreadable)]
    file = write_unreadable(out, lines)
    if not lines:
        return
    outcome = f"{len(lines)} of {len(names)} images in {folder} cannot be read: {shown(lines)}, all listed in {file}"
    if strict or len(lines) == len(names):
        remedy = "copy them again or remove them" + (", or omit --strict" if strict else "")
        raise DataError(f"{outcome}. Fix: {remedy}.", key="FOLDER")
    logger.warning("warning: %s; they are left out", outcome)


def _metadata(cfg: CfgNode, trained: TrainedModel, root: Path, num_images: int, num_unreadable: int) -> Metadata:
    weight = str(trained.file.resolve())
    settings = cfg.clone()
    settings.defrost()
    settings.TEST.WEIGHT = weight  # valid in any working directory
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
