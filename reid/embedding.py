"""Embeddings of image files, and the story of a folder that becomes a gallery, on all ranks."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
from ignite.engine import Engine, Events
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from reid import distributed
from reid.config import dump
from reid.data.loaders import Batch
from reid.data.samplers import EvaluationBatches
from reid.data.splits import IMAGE_SUFFIXES
from reid.data.store import decode, reason_of
from reid.distances import Distance, prepare_embeddings
from reid.engine import Embedded, Preparation, build_embedder
from reid.errors import DataError, NonFiniteError, shared
from reid.gallery import EmbeddingFile, Metadata, write_gallery, write_unreadable, writing_embeddings
from reid.handlers.watchdog import Watchdog
from reid.model import ReIDModel
from reid.preemption import Signals
from reid.trained import Trained, load_trained

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

logger = logging.getLogger("reid.embedding")

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
    names = distributed.together(lambda: list_images(root))
    distributed.agree(
        {f"the images in {folder}": hashlib.sha256(os.fsencode("\0".join(names))).hexdigest()}, key="FOLDER"
    )
    trained = load_trained(cfg, accelerator)
    out = Path(output) if output else Path(cfg.OUTPUT_DIR) / "galleries" / root.resolve().name
    watchdog = Watchdog(cfg.SOLVER.TIMEOUT_MINUTES)
    embedder = ImageEmbedder(trained.model, accelerator, cfg, beat=watchdog.beat)
    start = time.monotonic()
    with ExitStack() as files, watchdog.watching():
        file = _on_main(lambda: files.enter_context(writing_embeddings(out, trained.model.num_features)))
        unreadable = _embed_all(embedder, root, names, file)
        _on_main(lambda: _tell_unreadable(out, folder, names, unreadable, strict=strict))
        _on_main(files.close)
    readable = [name for place, name in enumerate(names) if place not in unreadable]
    metadata = _metadata(cfg, trained, root, len(readable), len(unreadable))
    _on_main(lambda: write_gallery(out, readable, metadata))
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


class Rows(NamedTuple):
    """What all ranks together made of N images."""

    embedding: Tensor  # [N, D], of length 1 where they compare by cosine
    unreadable: dict[int, str]  # position -> reason; these rows mean nothing

    def readable(self) -> Tensor:
        """The embeddings that mean something, in order."""
        kept = [place for place in range(len(self.embedding)) if place not in self.unreadable]
        return self.embedding[kept]


class ImageEmbedder:
    """Embeds image files as evaluation embeds its images; called by all ranks, the same result on all.

    Args:
        model: in evaluation mode, not wrapped.
        accelerator: whose precision is used.
        cfg: the whole configuration; TEST, INPUT, SOLVER.PRECISION and DATALOADER.NUM_WORKERS (threads) are read.
        beat: called after every batch, as a sign of life.
    """

    def __init__(
        self, model: ReIDModel, accelerator: Accelerator, cfg: CfgNode, *, beat: Callable[[], None] = lambda: None
    ) -> None:
        self._beat = beat
        self._distance: Distance = distance_of(cfg)
        self._size, self.batch_size = tuple(cfg.INPUT.SIZE_TEST), cfg.TEST.IMS_PER_BATCH
        self._num_threads = max(1, cfg.DATALOADER.NUM_WORKERS)
        weight = next(model.parameters())
        # A rank without a batch takes part with no rows.
        self._none = torch.zeros((0, model.num_features), dtype=weight.dtype, device=weight.device)
        preparation = Preparation(cfg, accelerator.device)
        self._embedder = build_embedder(model, accelerator, preparation, flip=cfg.TEST.FLIP)
        self._embedder.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        self._collected: list[Embedded] = []
        self._unreadable: dict[int, str] = {}
        Image.init()  # loads PIL's plug-ins, which two threads must not do at once

    def embed(self, paths: Sequence[Path]) -> Rows:
        """The embeddings of N images; each rank decodes and embeds its share of their batches.

        Raises:
            NonFiniteError: one is not finite.
        """
        batches = EvaluationBatches(
            len(paths), batch_size=self.batch_size, rank=distributed.rank(), num_ranks=distributed.num_ranks()
        )
        self._collected, self._unreadable = [], {}
        if len(batches):
            with ThreadPoolExecutor(self._num_threads, thread_name_prefix="decode") as pool:
                self._embedder.run(self._decoded(paths, batches, pool), max_epochs=1, epoch_length=len(batches))
        embedding = torch.cat([self._none, *(part.embedding for part in self._collected)])
        sample_ids = torch.cat([torch.zeros(0, dtype=torch.int64), *(part.sample_ids for part in self._collected)])
        self._collected = []
        embedding = distributed.gather_rows(embedding, sample_ids.to(embedding.device), len(paths))
        unreadable: dict[int, str] = {}
        for of_rank in distributed.gather_objects(self._unreadable):
            unreadable |= of_rank
        try:
            return Rows(prepare_embeddings(embedding, self._distance), unreadable)
        except ValueError as error:
            raise shared(
                NonFiniteError(
                    f"the model's {error}; its weights or BatchNorm statistics are broken", key="TEST.WEIGHT"
                )
            ) from error

    def _decoded(self, paths: Sequence[Path], batches: EvaluationBatches, pool: ThreadPoolExecutor) -> Iterator[Batch]:
        waiting: deque[dict[int, Future[bytes]]] = deque()
        for planned in batches:
            waiting.append({i: pool.submit(decode, paths[i], self._size) for i in planned.sample_ids.tolist()})
            if len(waiting) > _AHEAD:
                yield self._batch(waiting.popleft())
        while waiting:
            yield self._batch(waiting.popleft())

    def _batch(self, decoded: dict[int, Future[bytes]]) -> Batch:
        """The images; black where one cannot be read, so that the others' embeddings do not depend on it."""
        images = np.zeros((len(decoded), *self._size, 3), dtype=np.uint8)
        for image, (place, future) in zip(images, decoded.items(), strict=True):
            try:
                image[:] = np.frombuffer(future.result(), np.uint8).reshape(image.shape)
            except Exception as error:  # a broken file makes PIL's decoders raise nearly anything
                self._unreadable[place] = reason_of(error)
        ids = torch.tensor(list(decoded))
        no_draws = torch.zeros((len(ids), 0), dtype=torch.int32)
        return Batch(torch.from_numpy(images), torch.zeros_like(ids), ids, no_draws)

    def _collect(self, engine: Engine) -> None:
        self._collected.append(engine.state.output)  # type: ignore[arg-type]
        self._beat()


def distance_of(cfg: CfgNode) -> Distance:
    """How embeddings compare."""
    return "cosine" if cfg.TEST.FEAT_NORM else "euclidean"


def _on_main(work: Callable[[], T]) -> T | None:
    """Runs the work on rank 0; its errors reach all ranks."""
    return distributed.together(lambda: work() if distributed.is_main() else None)


def _embed_all(embedder: ImageEmbedder, root: Path, names: Sequence[str], file: EmbeddingFile | None) -> dict[int, str]:
    """Writes the embeddings of all images that can be read; returns position -> reason of the others."""
    num_images = _BATCHES_PER_ROUND * embedder.batch_size
    unreadable: dict[int, str] = {}
    is_shown = distributed.is_main() and sys.stderr.isatty()
    with tqdm(total=len(names), desc=str(root), unit="img", disable=not is_shown) as bar:
        for start in range(0, len(names), num_images):
            part = names[start : start + num_images]
            rows = embedder.embed([root / name for name in part])
            unreadable |= {start + place: reason for place, reason in rows.unreadable.items()}
            readable = rows.readable().float().cpu().numpy()
            distributed.together(lambda readable=readable: file.append(readable) if file else None)  # type: ignore[misc]
            bar.update(len(part))
    return unreadable


def _tell_unreadable(out: Path, folder: str, names: Sequence[str], unreadable: dict[int, str], *, strict: bool) -> None:
    lines = [f"{names[place]} ({unreadable[place]})" for place in sorted(unreadable)]
    file = write_unreadable(out, lines)
    if not lines:
        return
    shown = ", ".join(lines[:_NUM_SHOWN]).encode("utf-8", "backslashreplace").decode()
    more = f" and {len(lines) - _NUM_SHOWN} more" if len(lines) > _NUM_SHOWN else ""
    words = f"{len(lines)} of {len(names)} images in {folder} cannot be read: {shown}{more}, all listed in {file}"
    if strict or len(lines) == len(names):
        raise DataError(
            f"{words}; copy them again or remove them{', or leave --strict out' if strict else ''}", key="FOLDER"
        )
    logger.warning("warning: %s; they are left out", words)


def _metadata(cfg: CfgNode, trained: Trained, root: Path, num_images: int, num_unreadable: int) -> Metadata:
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
