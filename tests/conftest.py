"""Settings of the test run: examples of properties, order of files, reruns, and shared fixtures."""

from __future__ import annotations

import os

# Before torch is imported: small tensors gain nothing from threads, which wait for each other on busy machines.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings

if TYPE_CHECKING:  # it imports torch, which xdist's controller need not wait for
    from program import Place

# The same examples each time, without a deadline, as torch's first call outlasts the usual one. The slow run loads
# `thorough`.
settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
settings.register_profile("thorough", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("default")

# Workers take file after file, so the long ones come first.
LONG = ("test_train_sbatch", "test_continuity", "test_wandb_online", "test_collectives", "test_torchrun", "test_train")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files, and reject a test that is rerun without a reason."""
    for item in items:
        marker = item.get_closest_marker("flaky")
        if marker is not None and not marker.kwargs.get("reason"):
            raise pytest.UsageError(f'{item.nodeid}: use @pytest.mark.flaky(reason="...", reruns=1)')
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Return the folder in which tests start the program; each uses names that no other uses."""
    from program import TINY

    yield from _place(tmp_path_factory.mktemp("place"), TINY)


@pytest.fixture(scope="session")
def small_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Return a folder whose model has a thirtieth of the weights: short trainings mostly write and read them."""
    from program import SMALL, TINY

    yield from _place(tmp_path_factory.mktemp("small"), TINY.replace("resnet18", SMALL))


def _place(folder: Path, settings: str) -> Iterator[Place]:
    from program import Place

    yield Place(folder, settings)
    for file in folder.rglob("*.pt"):  # hundreds of megabytes; pytest keeps the folders of three runs
        file.unlink()


@pytest.fixture(scope="session")
def golden() -> Mapping[str, np.ndarray]:
    """Return embeddings, labels and scores recorded from reid-strong-baseline."""
    return np.load(Path(__file__).parent / "golden" / "evaluation.npz")
