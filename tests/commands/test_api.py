"""The public Python API: what `reid.NAME` gives, without torch until it is used.

Also covers reid.checkpoints.load_model.
"""

from __future__ import annotations

import csv
import inspect
import json
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from program import Place
from refusals import refused

import reid
from reid.errors import DataError, SettingsError, WorldError


@pytest.fixture(scope="module")
def place(small_place: Place) -> Place:
    return small_place


def train_and_evaluate(folder: Path, num_epochs: int = 1) -> int:
    cfg = reid.load_config("tiny.yml", [f"OUTPUT_DIR={folder}", f"SOLVER.MAX_EPOCHS={num_epochs}"])
    result = reid.train(cfg)
    best = sorted((folder / "checkpoints").glob("best_*.pt"))[-1]
    evaluated = reid.evaluate(reid.load_config("tiny.yml", [f"OUTPUT_DIR={folder}-test", f"TEST.WEIGHT={best}"]))
    (folder / f"returned_{os.environ.get('RANK', '0')}.json").write_text(json.dumps([result, evaluated]))
    return 0


@pytest.fixture(scope="module")
def trained(place: Place) -> Path:
    """The folder of a training by `reid.train`."""
    folder = place.folder / "api"
    (ended,) = place.fork(partial(train_and_evaluate, folder)).ended()
    assert ended.code == 0, ended
    return folder


def test_names_are_imported_without_torch_until_used():
    code = (
        "import sys, reid; assert 'torch' not in sys.modules; cfg = reid.load_config(); assert cfg.is_frozen(); "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; "
        "assert all(getattr(reid, name).__doc__ for name in reid.__all__); assert set(reid.__all__) <= set(dir(reid))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'reranking_scores'"):
        _ = reid.reranking_scores  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("load_config", ["config_file", "overrides"]),
        ("build_model", ["cfg", "num_pids"]),
        ("load_model", ["file_or_wandb_reference", "device"]),
        ("train", ["cfg"]),
        ("evaluate", ["cfg"]),
        ("learning_rate", ["solver", "epoch"]),
        ("batch_hard_triplet", ["feat", "pids", "margin"]),
        ("label_smoothed_cross_entropy", ["logits", "pids", "epsilon"]),
        ("center_loss", ["feat", "pids", "centers"]),
        ("retrieval_scores", ["q_embedding", "q_pids", "q_camids", "g_embedding", "g_pids", "g_camids"]),
        ("scores_from_distmat", ["distmat", "q_pids", "q_camids", "g_pids", "g_camids"]),
        ("k_reciprocal", ["q_embedding", "g_embedding", "k1", "k2", "lambda_value"]),
    ],
)
def test_arguments_have_the_published_names(name, parameters):
    assert list(inspect.signature(getattr(reid, name)).parameters)[: len(parameters)] == parameters


def train_twice(folder: Path) -> int:
    for name in ("a", "b"):
        reid.train(reid.load_config("tiny.yml", [f"OUTPUT_DIR={folder / name}", "SOLVER.MAX_EPOCHS=1"]))
    assert logging.getLogger("reid").handlers == []
    return subprocess.run(
        [sys.executable, "-m", "reid", "train", "--config_file", "tiny.yml", "OUTPUT_DIR", folder / "a"], check=False
    ).returncode


def test_each_run_has_its_own_log_and_frees_its_folder(place):
    folder = place.folder / "twice"
    (ended,) = place.fork(partial(train_twice, folder)).ended()
    assert ended.code == 0, ended
    logs = {name: (folder / name / "log.txt").read_text() for name in ("a", "b")}
    assert f"all files are in {folder / 'a'}" in logs["a"]
    assert f"all files are in {folder / 'b'}" in logs["b"]
    assert str(folder / "b") not in logs["a"]
    assert ended.err == ""


def test_train_returns_what_result_json_holds(trained):
    result, evaluated = json.loads((trained / "returned_0.json").read_text())
    best = result.pop("best")
    assert result == json.loads((trained / "result.json").read_text())
    assert best["mAP"] == result["mAP"]
    assert evaluated == json.loads(Path(f"{trained}-test/result.json").read_text())
    assert evaluated["mAP"] == pytest.approx(result["mAP"], abs=1e-6)


def test_two_ranks_return_the_result_of_one(place, trained):
    folder = place.folder / "api-two"
    ended = place.fork(partial(train_and_evaluate, folder), num_ranks=2).ended()
    assert [rank.code for rank in ended] == [0, 0], ended
    result, _ = json.loads((folder / "returned_1.json").read_text())
    expected, _ = json.loads((trained / "returned_0.json").read_text())
    assert result["mAP"] == pytest.approx(expected["mAP"], abs=1e-3)
    assert result["num_valid_queries"] == expected["num_valid_queries"]


def test_embedder_gives_what_the_command_embed_writes(place, trained):
    weight = sorted((trained / "checkpoints").glob("best_*.pt"))[-1]
    words = [query_folder(place), "--output", trained / "gallery", "TEST.WEIGHT", weight]
    (ended,) = place.run("embed", *words, bare=True)
    assert ended.code == 0, ended
    embedder = reid.load_model(weight, device="cpu")
    rows = csv.DictReader((trained / "gallery" / "images.csv").read_text().splitlines())
    paths = [query_folder(place) / row["path"] for row in rows]
    embedding = embedder.embed(paths)
    assert embedding.dtype == torch.float32
    assert embedding.shape == (len(paths), embedder.num_features)
    assert embedder.input_size == (32, 16)
    assert embedder.cfg.MODEL.NAME == "timm/test_resnet"
    np.testing.assert_allclose(embedding, np.load(trained / "gallery" / "embeddings.npy"), atol=1e-5)
    images = [Image.open(path) for path in paths[:3]]
    assert torch.equal(embedder.embed(images), embedder.embed([np.asarray(image) for image in images]))
    torch.testing.assert_close(embedder.embed([str(paths[0]), *images[1:]]), embedding[:3])
    assert torch.equal(embedder.embed(paths[0]), embedder.embed([paths[0]]))
    assert embedder.embed([]).shape == (0, embedder.num_features)
    with refused(DataError, "images", "position 1", "uint8 [H, W, 3]"):
        embedder.embed([images[0], np.zeros((4, 4, 3))])
    broken = trained / "broken.jpg"
    broken.write_bytes(b"no image")
    with refused(DataError, "images", "broken.jpg", "position 0"):
        embedder.embed(broken)


def query_folder(place: Place) -> Path:
    (folder,) = place.folder.glob("**/synthetic/query")
    return folder


def test_a_model_that_cannot_be_loaded_is_refused(tmp_path, trained):
    with refused(WorldError, "TEST.WEIGHT", "no.pt"):
        reid.load_model(tmp_path / "no.pt", device="cpu")
    weight = sorted((trained / "checkpoints").glob("best_*.pt"))[-1]
    with refused(SettingsError, "device", "nonsense"):
        reid.load_model(weight, device="nonsense")
    if not torch.cuda.is_available():
        with refused(SettingsError, "device", "cuda:1"):
            reid.load_model(weight, device="cuda:1")


def test_model_maps_images_to_embeddings():
    cfg = reid.load_config(overrides=["MODEL.NAME=resnet18", "MODEL.PRETRAIN_CHOICE=none", "MODEL.DEVICE=cpu"])
    model = reid.build_model(cfg, 5)
    assert model(torch.zeros(2, 3, 64, 32)).shape == (2, 512)
