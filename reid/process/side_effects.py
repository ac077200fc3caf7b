"""Guard around the optional side effects of a run: pictures, W&B and TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def optional(what: str, failures: list[str] | None = None) -> Iterator[None]:
    """Run the body; an error in it gives one warning, and its traceback goes to log.txt.

    Args:
        what: Consequence of an error, for the warning: "W&B: a table was not recorded".
        failures: List that also receives the warning.
    """
    try:
        yield
    except Exception as error:  # wandb, Pillow and TensorBoard raise errors of many libraries
        warn(f"{what} ({error_summary(error)})", failures)
        logger.debug("traceback of the warning above:", exc_info=True)  # reaches log.txt only


def warn(text: str, failures: list[str] | None = None) -> None:
    """Log that a side effect is missing, and add it to `failures`."""
    logger.warning("warning: %s; the training is not affected", text)
    if failures is not None:
        failures.append(text)


def error_summary(error: BaseException) -> str:
    """Return the error's type and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
