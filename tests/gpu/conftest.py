"""Each check runs on a CPU, where its code is tried by every run of the tests, and on a GPU: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from device_checks import CUDA, forget_accelerator


@pytest.fixture(scope="session", params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the warnings of libraries pass: they differ by device and driver, and would hide the results."""
    for item in items:
        if "device" in getattr(item, "fixturenames", ()) and item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True)
def no_accelerator_of_another_test() -> Iterator[None]:
    yield
    forget_accelerator()
