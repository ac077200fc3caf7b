"""Errors for the user: one sentence with what must hold, what was given, and the fix."""

from __future__ import annotations

from typing import Protocol, TypeVar


class ReidError(Exception):
    """Base class of the errors that the command line prints as one sentence; any other keeps its traceback.

    Args:
        message: Requirement, given value and fix, in one line.
        key: Full key of the setting that the message is about, such as "SOLVER.BASE_LR", or else the option
            ("--output") or environment variable ("WANDB_API_KEY"); None if the user has set nothing wrong.

    Attributes:
        is_shared: Whether every rank raises this error, so that only rank 0 reports it.
    """

    is_shared: bool = False

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class SettingsError(ReidError, ValueError):
    """A setting is wrong; the message names it by its full key."""


class UnknownKeyError(SettingsError, KeyError):
    """A key that the configuration tree does not have."""

    def __str__(self) -> str:  # KeyError would print the message's repr
        return str(self.args[0])


class DataError(ReidError, ValueError):
    """The data set on disk is incomplete or damaged; the message names the path."""


class WorldError(ReidError, RuntimeError):
    """The environment of the run does not fit: a missing rank, a checkpoint of another model, a full disk."""


class TakenOverError(WorldError):
    """Another start of the training owns the run's folder now; this one must not write into it any more."""


class UnsavedError(WorldError):
    """Training is over, but not all of its results could be written."""


class NonFiniteError(ReidError, FloatingPointError):
    """A loss, a weight or an embedding is no longer a finite number."""


class _Shareable(Protocol):
    is_shared: bool


E = TypeVar("E", bound=_Shareable)


def reason_of(error: BaseException) -> str:
    """Return the first line of a foreign error's message; its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shared(error: E) -> E:
    """Return the error, marked as one that every rank raises, so that only rank 0 reports it."""
    error.is_shared = True
    return error
