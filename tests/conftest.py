"""Properties are tried on the same examples each time, without a deadline: torch's first call outlasts the default."""

import os

# Before torch is imported: small tensors gain nothing from threads, which wait for each other on busy machines.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from program import Place

settings.register_profile("reid", deadline=None, derandomize=True)
settings.load_profile("reid")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Where the tests start the program; what they make there has names of their own."""
    folder = tmp_path_factory.mktemp("place")
    yield Place(folder)
    for file in folder.rglob("*.pt"):  # hundreds of megabytes; pytest keeps the folders of three runs
        file.unlink()


@pytest.fixture(scope="session")
def golden() -> Mapping[str, np.ndarray]:
    """Embeddings, labels and scores recorded of reid-strong-baseline."""
    return np.load(Path(__file__).parent / "golden" / "evaluation.npz")
