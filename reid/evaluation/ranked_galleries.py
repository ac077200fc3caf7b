"""Pictures in OUTPUT_DIR/pictures: the first batch, ranked queries, CMC curves; every rank calls, rank 0 draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from ignite.engine import Engine, Events
from PIL import Image

from reid.data.datasets import DataSets
from reid.data.loaders import TestData, TrainData
from reid.data.preprocessing import BatchPreprocessor
from reid.distributed import collectives
from reid.evaluation.drawing import GalleryCell, batch_grid, cmc_chart, denormalize, ranked_gallery, sheet
from reid.evaluation.examples import Example, find_examples, query_table, seeded_queries, worst_queries
from reid.models.backbones import normalization
from reid.process.files import atomic_write
from reid.process.side_effects import optional
from reid.retrieval.distances import Distances
from reid.retrieval.metrics import RetrievalScores
from reid.runs.progress import Progress, Records

if TYPE_CHECKING:
    from yacs.config import CfgNode

_MOST_IMAGES = 64  # of a batch that are drawn
_LEGEND = "green: right, red: wrong; left out: the query's identity on its own camera"


class Figure(NamedTuple):
    """An image file; the key is W&B's."""

    key: str
    file: Path
    caption: str


class Table(NamedTuple):
    """Rows of plain values; the key is W&B's. With a chart title it is shown as a line over the first column."""

    key: str
    columns: list[str]
    rows: list[list[Any]]
    chart_title: str = ""


@dataclass
class FigureSet:
    """Images and tables of one step of a run, for those who show them elsewhere."""

    iteration: int | None  # None for a separate evaluation
    epoch: int | None  # None if unknown
    images: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class _Compared:
    """Results of one evaluation on one test set."""

    data: TestData
    scores: RetrievalScores
    random: list[Example]
    worst: list[Example]


class Pictures:
    """Draws the first training batch, and the correct and wrong matches of every new best checkpoint.

    The file names are the same each time. An error costs only the picture.

    Args:
        cfg: Complete configuration; WANDB.LOG_IMAGES and WANDB.NUM_QUERIES are read.
        folder: Folder of the pictures.
        data: Test benchmarks.
        on_drawn: Callback on rank 0 for the new pictures.
    """

    def __init__(
        self, cfg: CfgNode, folder: Path, data: DataSets, on_drawn: Callable[[FigureSet], None] = lambda figures: None
    ) -> None:
        self._cfg, self._folder, self._on_drawn = cfg, folder, on_drawn
        self._is_on = bool(cfg.WANDB.LOG_IMAGES) and collectives.is_main()
        self._names = {benchmark.name: [path.name for path in benchmark.query.paths] for benchmark in data.test}
        self._compared: dict[str, _Compared] = {}

    def attach(self, trainer: Engine, progress: Progress, train_data: TrainData) -> None:
        """Draw at the start and after each best validation; attach it after the checkpoints, which know the best."""

        @trainer.on(Events.STARTED)
        def draw_batch(engine: Engine) -> None:
            file = self._folder / "train_batch.png"
            if engine.state.iteration == 0 or not file.exists():
                figures = FigureSet(engine.state.iteration, engine.state.epoch)
                self._attempt(lambda: self._draw_batch(file, train_data, figures), figures)

        @trainer.on(Records.VALIDATION)
        def draw_if_best(engine: Engine) -> None:
            if progress.last_is_best:
                self.draw(f"epoch {engine.state.epoch}", engine.state.iteration, engine.state.epoch)

    def compare(self, name: str, data: TestData, distances: Distances, scores: RetrievalScores) -> None:
        """Keep what `draw` needs of an evaluation; for `EvaluatorGroup`."""
        self._compared.pop(name, None)
        self._attempt(lambda: self._compare(name, data, distances, scores))

    def _compare(self, name: str, data: TestData, distances: Distances, scores: RetrievalScores) -> None:
        num = self._cfg.WANDB.NUM_QUERIES
        random = seeded_queries(scores.per_query, num, self._cfg.SEED)
        worst = worst_queries(scores.per_query, num)
        examples = find_examples([*random, *worst], distances, data.query, data.gallery)
        self._compared[name] = _Compared(data, scores, examples[: len(random)], examples[len(random) :])

    def draw(self, checkpoint: str, iteration: int | None, epoch: int | None) -> None:
        """Draw the last evaluation; the titles name the checkpoint."""
        figures = FigureSet(iteration, epoch)
        self._attempt(lambda: self._draw_all(checkpoint, figures), figures)

    def _attempt(self, work: Callable[[], None], figures: FigureSet | None = None) -> None:
        if self._is_on:
            with optional("a picture is missing"):
                work()
            if figures is not None:
                self._on_drawn(figures)

    def _draw_all(self, checkpoint: str, figures: FigureSet) -> None:
        for name, compared in self._compared.items():
            section = f"val/{name}" if len(self._compared) > 1 else "val"
            title = f"{name}, {checkpoint}"
            figures.tables.append(self._draw_cmc(name, f"{section}/cmc", title, compared.scores))
            kinds = {
                "random_queries": ("random queries", compared.random),
                "worst_queries": ("the queries with the lowest AP", compared.worst),
            }
            for kind, (subtitle, examples) in kinds.items():
                if examples:
                    file = self._folder / f"{kind}_{name}.png"
                    _save(file, self._ranked(f"{title}: {subtitle}", compared, examples))
                    captions = [self._caption(self._names[name], compared, example) for example in examples]
                    figures.images.append(Figure(f"{section}/{kind}", file, "\n".join(captions)))
            columns, rows = query_table(compared.scores.per_query, compared.data.query, self._names[name])
            figures.tables.append(Table(f"{section}/AP_per_query", columns, rows))

    def _draw_cmc(self, name: str, key: str, title: str, scores: RetrievalScores) -> Table:
        curve = scores.cmc.tolist()
        title = f"CMC curve of {title}"
        chart = cmc_chart({_summary(scores): curve}, title)
        if chart is not None:
            _save(self._folder / f"cmc_{name}.png", chart)
        points = [[float(rank), value] for rank, value in enumerate(curve, 1)]
        return Table(key, ["rank", "fraction of queries with a match"], points, title)

    def _ranked(self, title: str, compared: _Compared, examples: Sequence[Example]) -> Image.Image:
        rows = [self._row(compared, example) for example in examples]
        return sheet(rows, title, f"{_summary(compared.scores)}; {_LEGEND}")

    def _row(self, compared: _Compared, example: Example) -> Image.Image:
        query, gallery = compared.data.query, compared.data.gallery
        num_queries = len(query.pids)
        positions = np.array([example.query, *(num_queries + index for index in example.gallery)], dtype=np.int64)
        first, *others = compared.data.images.images(positions)
        per_query = compared.scores.per_query
        labels = (
            f"pid {int(query.pids[example.query])}",
            f"camid {int(query.camids[example.query])}",
            f"AP {100 * float(per_query.average_precision[example.query]):.1f} %",
            f"first at {int(per_query.first_match[example.query]) + 1}",
        )
        matches = [
            GalleryCell(
                image, (f"pid {int(gallery.pids[i])}", f"camid {int(gallery.camids[i])}", self._closeness(distance))
            )
            for image, i, distance in zip(others, example.gallery, example.distances, strict=True)
        ]
        return ranked_gallery(GalleryCell(first, labels), matches, example.is_match)

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

    def _draw_batch(self, file: Path, train_data: TrainData, figures: FigureSet) -> None:
        """Draw the planned global batch: it is the same for any number of ranks, and no rank waits."""
        planned = train_data.batches.first_global_batch()
        each = 1 if self._cfg.DATALOADER.SAMPLER == "softmax" else self._cfg.DATALOADER.NUM_INSTANCE
        num = min(max(_MOST_IMAGES // each, 1) * each, len(planned.sample_ids))
        some = planned._replace(sample_ids=planned.sample_ids[:num], positions=planned.positions[:num])
        batch = train_data.images.batch(some)
        prepared = BatchPreprocessor(self._cfg, torch.device("cpu")).for_training(batch).numpy()
        images = denormalize(prepared, *normalization(self._cfg))
        of_all = f"{num} of {len(planned.sample_ids)} images" if num < len(planned.sample_ids) else f"{num} images"
        note = f"{of_all} as the model sees them: flipped, padded and cropped, partly erased; pids are labels"
        _save(file, batch_grid(images, batch.pids.tolist(), "the first training batch", note))
        figures.images.append(Figure("train/batch", file, note))


def _summary(scores: RetrievalScores) -> str:
    summary = scores.summary()
    return ", ".join(f"{name} {100 * summary[name]:.1f} %" for name in ("mAP", "rank-1", "rank-5", "rank-10"))


def _save(file: Path, image: Image.Image) -> None:
    file.parent.mkdir(exist_ok=True)
    with atomic_write(file, key="OUTPUT_DIR") as temporary:
        image.save(temporary, compress_level=3)  # a fifth of the time, a tenth more bytes
