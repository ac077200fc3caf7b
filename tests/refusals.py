"""What is asserted of an error for the user: its type, the key that it is about and a word of what it says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from reid.errors import ReidError


@contextmanager
def refused(kind: type[ReidError], key: str | None, *keywords: str) -> Iterator[None]:
    """What happens inside must raise an error of this kind, about this key, whose one line has all of the keywords."""
    with pytest.raises(kind) as caught:
        yield
    assert caught.value.key == key, caught.value
    message = str(caught.value)
    assert "\n" not in message
    assert message
    assert [keyword for keyword in keywords if keyword not in message] == [], message
