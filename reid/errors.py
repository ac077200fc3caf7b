"""Errors written for the user: one sentence that says what must hold, what it got, and the remedy."""

from __future__ import annotations

from typing import TypeVar

E = TypeVar("E", bound=BaseException)


class SettingsError(ValueError):
    """A setting is wrong; the message names it by its full key."""


class UnknownKeyError(SettingsError, KeyError):
    """A key that the configuration tree does not have."""

    def __str__(self) -> str:  # KeyError would print the message's repr
        return str(self.args[0])


class DataError(ValueError):
    """The data set on disk is not what it must be; the message names the path."""


class WorldError(RuntimeError):
    """The world around the run does not fit: a missing rank, a checkpoint of another model, a full disk."""


class TakenOverError(WorldError):
    """Another start of the training has the run's folder now; this one must not write into it any more."""


class UnsavedError(WorldError):
    """Training is over, but not all of its outcome could be written."""


# What the command line prints as one sentence; anything else is our own fault and keeps its traceback.
USER_ERRORS = (SettingsError, DataError, WorldError, FloatingPointError)


def shared(error: E) -> E:
    """The error, marked as one that every rank raises, so that only rank 0 tells it."""
    error.is_shared = True  # type: ignore[attr-defined]
    return error
