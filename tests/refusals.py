"""Assertion about an error for the user: its type, its key and keywords of its message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from reid.errors import ReidError


@contextmanager
def refused(kind: type[ReidError], key: str | None, *keywords: str) -> Iterator[None]:
    """Assert that the block raises an error of this kind and key, whose one line has all of the keywords."""
    with pytest.raises(kind) as caught:
        yield
    assert caught.value.key == key, caught.value
    message = str(caught.value)
    assert "\n" not in message
    assert message
    assert [keyword for keyword in keywords if keyword not in message] == [], message
