"""Tests of the pictures of a run: contents, times, and independence of everything else from them.

Also covers reid.evaluation.ranked_galleries, reid.process.side_effects.
"""

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from PIL import Image
from program import Ended, Place, names, records

from reid.config.load import load_config
from reid.data import loaders
from reid.data.loaders import StoredImages
from reid.evaluation.ranked_galleries import FigureSet, Pictures
from reid.retrieval.distances import Distances
from reid.retrieval.metrics import Labels, RetrievalScores, scores_from_distmat
from reid.runs.progress import Progress, Records

ALL = ["cmc_synthetic.png", "random_queries_synthetic.png", "train_batch.png", "worst_queries_synthetic.png"]


# ---- in the program ----


@pytest.fixture(scope="module")
def place(small_place: Place) -> Place:
    return small_place


@pytest.fixture(scope="module")
def drawn(place) -> tuple[Ended, Path]:
    """Train one epoch on two ranks, with pictures."""
    ended = place.train("OUTPUT_DIR", "drawn", "SOLVER.MAX_EPOCHS", 1, num_ranks=2)
    return ended, place.folder / "drawn" / "pictures"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_run_leaves_its_pictures_and_nothing_else(drawn):
    ended, folder = drawn
    assert names(folder) == ALL
    assert "warning" not in ended.out
    assert not (folder.parent / "tensorboard").exists()  # LOG.TENSORBOARD is no
    for name in ALL:
        picture = Image.open(folder / name)
        picture.load()
        assert picture.width > 300


@pytest.fixture(scope="module")
def alone(place) -> Path:
    """Train the same in one process."""
    place.train("OUTPUT_DIR", "drawn_alone", "SOLVER.MAX_EPOCHS", 1)
    return place.folder / "drawn_alone" / "pictures"


def test_first_batch_picture_is_equal_on_any_number_of_ranks(drawn, alone):
    assert contents(alone)["train_batch.png"] == contents(drawn[1])["train_batch.png"]


def test_resumed_training_draws_only_new_pictures(place, alone):
    before = (alone / "train_batch.png").stat()
    (alone / "cmc_synthetic.png").unlink()
    place.train("OUTPUT_DIR", "drawn_alone", "SOLVER.MAX_EPOCHS", 2)
    best = [record["epoch"] for record in sorted(records(alone.parent, "val"), key=lambda record: -record["mAP"])]
    assert names(alone) == [name for name in ALL if best[0] == 2 or not name.startswith("cmc")]
    after = (alone / "train_batch.png").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_an_evaluation_draws_what_it_finds(place, drawn):
    (best,) = (drawn[1].parent / "checkpoints").glob("best_*.pt")
    settings = ("TEST.WEIGHT", best, "TEST.FEAT_NORM", "no", "WANDB.NUM_QUERIES", 0, "OUTPUT_DIR", "drawn_eval")
    (ended,) = place.run("evaluate", *settings)
    assert (ended.code, ended.err) == (0, "")
    assert "warning" not in ended.out
    assert names(place.folder / "drawn_eval" / "pictures") == ["cmc_synthetic.png"]


def test_training_continues_when_pictures_cannot_be_written(place):
    folder = place.folder / "undrawn"
    folder.mkdir()
    for name in ("pictures", "tensorboard"):
        (folder / name).write_text("no folder")
    ended = place.train("OUTPUT_DIR", folder.name, "SOLVER.MAX_EPOCHS", 1, "LOG.TENSORBOARD", "yes", num_ranks=2)
    warnings = [line for line in ended.out.splitlines() if "warning" in line]
    assert [line.partition(" (")[0] for line in warnings] == [
        "warning: TensorBoard: nothing is written",
        "warning: a picture is missing",  # the batch
        "warning: a picture is missing",  # the evaluation
    ]
    assert all("File exists" in line for line in warnings)
    log = (folder / "log.txt").read_text()
    assert log.count("\nTraceback ") == len(warnings)
    assert "Traceback" not in ended.out
    assert ended.err == ""


# ---- without a run ----


class Setting:
    """A trainer and pictures of `names`, with evaluations made by hand."""

    def __init__(self, folder: Path, names: list[str], *settings: str, images_seed: int = 0) -> None:
        rng = np.random.default_rng(images_seed)
        self.query, self.gallery = Labels.of([1, 2, 3], [0, 0, 1]), Labels.of([1, 1, 2, 3, 0, 3], [0, 1, 1, 0, 0, 1])
        pixels = rng.integers(0, 256, (9, 16, 8, 3), dtype=np.uint8)
        stored = StoredImages([pixels[:3], pixels[3:]], np.zeros(9, np.int64), None)
        self.data = loaders.TestData(None, self.query, self.gallery, stored)  # type: ignore[arg-type]
        paths = [Path(f"{number:04d}_c1.jpg") for number in range(3)]
        benchmarks = [SimpleNamespace(name=name, query=SimpleNamespace(paths=paths)) for name in names]
        self.seen: list[FigureSet] = []
        cfg = load_config(None, list(settings))
        self.pictures = Pictures(
            cfg, folder / "pictures", SimpleNamespace(train=(), test=benchmarks), on_drawn=self.seen.append
        )
        self.trainer, self.progress = Engine(lambda engine, batch: None), Progress()
        self.trainer.register_events(*Records)
        self.pictures.attach(self.trainer, self.progress, None)  # type: ignore[arg-type]

    def evaluate(self, epoch: int, distmat: np.ndarray, names: list[str]) -> RetrievalScores:
        matrix = torch.as_tensor(distmat)
        distances = Distances(lambda block: matrix[block], matrix.new_zeros(len(matrix)))
        labels = (self.query.pids, self.query.camids, self.gallery.pids, self.gallery.camids)
        scores = scores_from_distmat(matrix, *labels)
        for name in names:
            self.pictures.compare(name, self.data, distances, scores)
        self.trainer.state.epoch, self.trainer.state.iteration = epoch, 10 * epoch
        self.progress.add_validation(epoch, 10 * epoch, scores.summary())
        self.trainer.fire_event(Records.VALIDATION)
        return scores


GOOD = np.array([[0.1, 0.2, 0.9, 0.8, 0.7, 0.6], [0.5, 0.6, 0.1, 0.8, 0.9, 0.7], [0.5, 0.6, 0.7, 0.1, 0.9, 0.2]])
WORSE = GOOD[:, ::-1].copy()


def test_only_a_new_best_is_drawn(tmp_path):
    setting = Setting(tmp_path, ["a"])
    setting.evaluate(1, WORSE, ["a"])
    first = contents(tmp_path / "pictures")
    setting.evaluate(2, GOOD, ["a"])
    best = contents(tmp_path / "pictures")
    setting.evaluate(3, WORSE, ["a"])
    assert first.keys() == best.keys() == {"cmc_a.png", "random_queries_a.png", "worst_queries_a.png"}
    assert all(first[name] != best[name] for name in best)
    assert contents(tmp_path / "pictures") == best
    assert [(drawn.epoch, drawn.iteration) for drawn in setting.seen] == [(1, 10), (2, 20)]


def test_what_cannot_be_compared_leaves_the_pictures_of_before(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("reid"), "propagate", True)
    setting = Setting(tmp_path, ["a"])
    setting.evaluate(1, WORSE, ["a"])
    before = contents(tmp_path / "pictures")
    monkeypatch.setattr("reid.evaluation.ranked_galleries.find_examples", lambda *_: torch.zeros(1 << 60))
    setting.evaluate(2, GOOD, ["a"])
    assert contents(tmp_path / "pictures") == before
    (warnings,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert re.fullmatch(r"warning: [^\n]*RuntimeError: [^\n]+", warnings)


def test_drawn_pictures_are_published_with_captions_and_curves(tmp_path):
    setting = Setting(tmp_path, ["a"])
    scores = setting.evaluate(1, WORSE, ["a"])
    (drawn,) = setting.seen
    files = [tmp_path / "pictures" / f"{kind}_queries_a.png" for kind in ("random", "worst")]
    assert [(key, file) for key, file, _ in drawn.images] == [
        ("val/random_queries", files[0]),
        ("val/worst_queries", files[1]),
    ]
    captions = drawn.images[1][2].splitlines()
    ap = scores.per_query.average_precision
    order = ap.argsort(stable=True).tolist()
    assert [caption.split(":")[0] for caption in captions] == [f"{number:04d}_c1.jpg" for number in order]
    # Gallery image 0 is from the camera of query 0 and left out; the only other image of its person ranks third.
    assert captions[order.index(0)] == "0000_c1.jpg: AP 33.3 %, --+--"
    curve, table = drawn.tables
    assert curve.key == "val/cmc"
    assert curve.chart_title
    assert curve.rows == [list(point) for point in enumerate(scores.cmc.tolist(), 1)]
    assert (table.key, table.chart_title) == ("val/AP_per_query", "")
    assert [dict(zip(table.columns, row, strict=True))["AP"] for row in table.rows] == sorted(ap.tolist())


def test_every_test_set_has_its_pictures(tmp_path):
    setting = Setting(tmp_path, ["a", "b"])
    setting.evaluate(1, GOOD, ["a", "b"])
    (drawn,) = setting.seen
    kinds = ("cmc", "random_queries", "worst_queries")
    assert names(tmp_path / "pictures") == sorted(f"{kind}_{name}.png" for kind in kinds for name in ("a", "b"))
    assert [key for key, *_ in drawn.images] == [f"val/{name}/{kind}" for name in ("a", "b") for kind in kinds[1:]]
    keys = [f"val/{name}/{kind}" for name in ("a", "b") for kind in ("cmc", "AP_per_query")]
    assert [table.key for table in drawn.tables] == keys


def test_without_images_nothing_is_drawn(tmp_path):
    setting = Setting(tmp_path, ["a"], "WANDB.LOG_IMAGES=no")
    setting.evaluate(1, GOOD, ["a"])
    assert setting.seen == []
    assert not (tmp_path / "pictures").exists()


def colors(file: Path) -> set[tuple[int, ...]]:
    return set(map(tuple, np.asarray(Image.open(file)).reshape(-1, 3).tolist()))


def test_the_picture_has_the_stored_images_of_the_ranking(tmp_path):
    """Each image has one color; a sheet shows the query and the kept gallery images only."""
    setting = Setting(tmp_path, ["a"], "WANDB.NUM_QUERIES=1")
    plain = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.array([20, 10, 3], np.uint8) + np.uint8(5)
    pixels = np.broadcast_to(plain, (9, 16, 8, 3)).copy()
    object.__setattr__(setting.data, "images", StoredImages([pixels[:3], pixels[3:]], np.zeros(9, np.int64), None))
    scores = setting.evaluate(1, WORSE, ["a"])
    worst = int(scores.per_query.average_precision.argmin())
    junk = {0: 0, 2: 5}.get(worst)  # gallery images of the same person and camera
    kept = {3 + number for number in range(6) if number != junk}
    shown = colors(tmp_path / "pictures" / "worst_queries_a.png") & set(map(tuple, pixels[:, 0, 0].tolist()))
    assert shown == {tuple(pixels[number, 0, 0].tolist()) for number in {worst, *kept}}


@pytest.mark.parametrize(
    ("settings", "label"),
    [([], "cos 0.25"), (["TEST.FEAT_NORM=no"], "d 0.50")],
)
def test_closeness_is_in_the_units_that_the_user_knows(tmp_path, settings, label):
    distance = -0.25 if not settings else 0.25  # a negative cosine; a squared distance
    assert Setting(tmp_path, ["a"], *settings).pictures._closeness(distance) == label
