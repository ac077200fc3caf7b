"""Pictures in OUTPUT_DIR/pictures: the first batch, ranked queries, CMC curves; every rank calls, rank 0 draws."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from ignite.engine import Engine, Events
from PIL import Image

from reid import distributed
from reid.backbones import normalisation
from reid.data.loaders import TestData, TrainData
from reid.data.preprocessing import BatchPreprocessor
from reid.data.sets import DataSets
from reid.distances import Distances
from reid.examples import Example, find_examples, query_table, seeded_queries, worst_queries
from reid.handlers.records import Progress, Records
from reid.metrics import RetrievalScores
from reid.pictures import GalleryCell, batch_grid, cmc_chart, denormalize, ranked_gallery, sheet
from reid.process.files import atomic_write

if TYPE_CHECKING:
    from yacs.config import CfgNode

logger = logging.getLogger("reid.pictures")

_MOST_IMAGES = 64  # of a batch that are drawn
_LEGEND = "green: right, red: wrong; left out: the query's identity on its own camera"


@dataclass
class FigureSet:
    """What there is to see at one point of a run, for those who show it elsewhere; the keys are W&B's.

    Attributes:
        iteration: of training; None for an evaluation by itself.
        epoch: of training; None where it is not known.
        images: key, PNG file and caption of each.
        curves: key, values of x and y, title, name of x and name of y of each.
        tables: key, columns and rows of each.
    """

    iteration: int | None
    epoch: int | None
    images: list[tuple[str, Path, str]] = field(default_factory=list)
    curves: list[tuple[str, list[float], list[float], str, str, str]] = field(default_factory=list)
    tables: list[tuple[str, list[str], list[list[object]]]] = field(default_factory=list)


@dataclass(frozen=True)
class _Compared:
    """What one evaluation found on one test set."""

    data: TestData
    scores: RetrievalScores
    random: list[Example]
    worst: list[Example]


class Pictures:
    """Draws the first training batch, and of every new best what it finds and what it misses.

    The pictures are of the best checkpoint, as the file names are the same each time. Whatever goes wrong here, only
    the pictures are missing.

    Args:
        cfg: the whole configuration; WANDB.LOG_IMAGES and WANDB.NUM_QUERIES are read.
        folder: of the pictures.
        data: the benchmarks that are tested on.
        on_drawn: told what was drawn, on rank 0.
    """

    def __init__(
        self, cfg: CfgNode, folder: Path, data: DataSets, on_drawn: Callable[[FigureSet], None] = lambda drawn: None
    ) -> None:
        self._cfg, self._folder, self._on_drawn = cfg, folder, on_drawn
        self._is_on = bool(cfg.WANDB.LOG_IMAGES) and distributed.is_main()
        self._names = {benchmark.name: [path.name for path in benchmark.query.paths] for benchmark in data.test}
        self._compared: dict[str, _Compared] = {}

    def attach(self, trainer: Engine, progress: Progress, train_data: TrainData) -> None:
        """Attach it behind the checkpoints, which know the best validation."""

        @trainer.on(Events.STARTED)
        def draw_batch(engine: Engine) -> None:
            file = self._folder / "train_batch.png"
            if engine.state.iteration == 0 or not file.exists():
                drawn = FigureSet(engine.state.iteration, engine.state.epoch)
                self._attempt(lambda: self._draw_batch(file, train_data, drawn), drawn)

        @trainer.on(Records.VALIDATION)
        def draw_if_best(engine: Engine) -> None:
            if progress.last_is_best:
                self.draw(f"epoch {engine.state.epoch}", engine.state.iteration, engine.state.epoch)

    def compare(self, name: str, data: TestData, distances: Distances, scores: RetrievalScores) -> None:
        """Keeps what `draw` needs of an evaluation; for `Evaluators`."""
        self._compared.pop(name, None)
        self._attempt(lambda: self._compare(name, data, distances, scores))

    def _compare(self, name: str, data: TestData, distances: Distances, scores: RetrievalScores) -> None:
        num = self._cfg.WANDB.NUM_QUERIES
        random = seeded_queries(scores.per_query, num, self._cfg.SEED)
        worst = worst_queries(scores.per_query, num)
        examples = find_examples([*random, *worst], distances, data.query, data.gallery)
        self._compared[name] = _Compared(data, scores, examples[: len(random)], examples[len(random) :])

    def draw(self, of_what: str, iteration: int | None, epoch: int | None) -> None:
        """Draws the last evaluation.

        Args:
            of_what: the checkpoint's name, for the titles.
            iteration: see `FigureSet`.
            epoch: see `FigureSet`.
        """
        drawn = FigureSet(iteration, epoch)
        self._attempt(lambda: self._draw_all(of_what, drawn), drawn)

    def _draw_all(self, of_what: str, drawn: FigureSet) -> None:
        for name, compared in self._compared.items():
            section = f"val/{name}" if len(self._compared) > 1 else "val"
            title = f"{name}, {of_what}"
            self._draw_cmc(name, f"{section}/cmc", title, compared.scores, drawn)
            kinds = {
                "random_queries": ("random queries", compared.random),
                "worst_queries": ("the queries with the lowest AP", compared.worst),
            }
            for kind, (words, examples) in kinds.items():
                if examples:
                    file = self._folder / f"{kind}_{name}.png"
                    _save(file, self._ranked(f"{title}: {words}", compared, examples))
                    captions = [self._caption(self._names[name], compared, example) for example in examples]
                    drawn.images.append((f"{section}/{kind}", file, "\n".join(captions)))
            table = query_table(compared.scores.per_query, compared.data.query, self._names[name])
            drawn.tables.append((f"{section}/AP_per_query", *table))

    def _draw_cmc(self, name: str, key: str, title: str, scores: RetrievalScores, drawn: FigureSet) -> None:
        curve = scores.cmc.tolist()
        title = f"CMC curve of {title}"
        chart = cmc_chart({_in_words(scores): curve}, title)
        if chart is not None:
            _save(self._folder / f"cmc_{name}.png", chart)
        ranks = [float(k) for k in range(1, len(curve) + 1)]
        drawn.curves.append((key, ranks, curve, title, "rank", "fraction of queries with a match"))

    def _ranked(self, title: str, compared: _Compared, examples: Sequence[Example]) -> Image.Image:
        rows = [self._row(compared, example) for example in examples]
        return sheet(rows, title, f"{_in_words(compared.scores)}; {_LEGEND}")

    def _row(self, compared: _Compared, example: Example) -> Image.Image:
        query, gallery = compared.data.query, compared.data.gallery
        num_queries = len(query.pids)
        positions = np.array([example.query, *(num_queries + found for found in example.gallery)], dtype=np.int64)
        first, *others = compared.data.images.images(positions)
        per_query = compared.scores.per_query
        labels = (
            f"pid {int(query.pids[example.query])}",
            f"camid {int(query.camids[example.query])}",
            f"AP {100 * float(per_query.average_precision[example.query]):.1f} %",
            f"first at {int(per_query.first_match[example.query]) + 1}",
        )
        found = [
            GalleryCell(
                image, (f"pid {int(gallery.pids[i])}", f"camid {int(gallery.camids[i])}", self._closeness(distance))
            )
            for image, i, distance in zip(others, example.gallery, example.distances, strict=True)
        ]
        return ranked_gallery(GalleryCell(first, labels), found, example.is_match)

    def _closeness(self, distance: float) -> str:
        if self._cfg.TEST.RE_RANKING:
            return f"d {distance:.2f}"
        if self._cfg.TEST.FEAT_NORM:
            return f"cos {-distance:.2f}"
        return f"d {math.sqrt(max(distance, 0)):.2f}"  # Euclidean distances are compared squared

    def _caption(self, names: Sequence[str], compared: _Compared, example: Example) -> str:
        precision = float(compared.scores.per_query.average_precision[example.query])
        marks = "".join("+" if match else "-" for match in example.is_match)
        return f"{names[example.query]}: AP {100 * precision:.1f} %, {marks}"

    def _draw_batch(self, file: Path, train_data: TrainData, drawn: FigureSet) -> None:
        """From the plan, not from what the ranks hold: the same for any number of them, and no rank must wait."""
        planned = train_data.batches.first_global_batch()
        each = 1 if self._cfg.DATALOADER.SAMPLER == "softmax" else self._cfg.DATALOADER.NUM_INSTANCE
        num = min(max(_MOST_IMAGES // each, 1) * each, len(planned.sample_ids))
        some = planned._replace(sample_ids=planned.sample_ids[:num], positions=planned.positions[:num])
        batch = train_data.images.batch(some)
        prepared = BatchPreprocessor(self._cfg, torch.device("cpu")).for_training(batch).numpy()
        images = denormalize(prepared, *normalisation(self._cfg))
        of_all = f"{num} of {len(planned.sample_ids)} images" if num < len(planned.sample_ids) else f"{num} images"
        note = f"{of_all} as the model sees them: flipped, padded and cropped, partly erased; pids are labels"
        _save(file, batch_grid(images, batch.pids.tolist(), "the first training batch", note))
        drawn.images.append(("train/batch", file, note))

    def _attempt(self, work: Callable[[], None], drawn: FigureSet | None = None) -> None:
        if not self._is_on:
            return
        try:
            work()
        except Exception as error:  # whatever it is, a picture is not worth a training
            reason = str(error).partition("\n")[0]
            logger.warning("warning: a picture is missing (%s: %s)", type(error).__name__, reason)
        if drawn is not None:
            self._on_drawn(drawn)


def _in_words(scores: RetrievalScores) -> str:
    summary = scores.summary()
    return ", ".join(f"{name} {100 * summary[name]:.1f} %" for name in ("mAP", "rank-1", "rank-5", "rank-10"))


def _save(file: Path, image: Image.Image) -> None:
    file.parent.mkdir(exist_ok=True)
    with atomic_write(file, key="OUTPUT_DIR") as temporary:
        image.save(temporary, compress_level=3)  # a fifth of the time, a tenth more bytes
