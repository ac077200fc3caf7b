"""Sweeps at W&B: login and creation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import wandb

from reid.config.schema import SETTINGS
from reid.errors import WorldError


def log_in() -> None:
    """Log in at W&B without a prompt.

    Raises:
        WorldError: There is no key, or W&B rejects it.
    """
    with _translated_errors("accept the login"):
        wandb.setup(wandb.Settings(silent=True))
        has_key = wandb.login(prompt=False, verify=False)
    if not has_key:
        raise WorldError(
            "WANDB_API_KEY must be set for a sweep, got no key. Fix: set WANDB_API_KEY, or run: wandb login",
            key="WANDB_API_KEY",
        )


def create_sweep(sweep: dict[str, Any]) -> str:
    """Create a sweep at W&B and return its full name [ENTITY/]PROJECT/ID.

    Raises:
        WorldError: W&B rejects the sweep or cannot be reached.
    """
    entity, project = sweep.get("entity"), sweep.get("project") or SETTINGS["WANDB.PROJECT"].default
    with _translated_errors("create the sweep"):
        sweep_id = wandb.sweep(sweep, entity=entity, project=project)
    return "/".join(filter(None, (entity, project, sweep_id)))


@contextmanager
def _translated_errors(action: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # wandb raises its own errors and those of pydantic and requests
        reason = " ".join(str(error).split())
        raise WorldError(
            f"W&B must {action}, got: {reason}. Fix: correct WANDB_API_KEY, or check the network.", key="WANDB_API_KEY"
        ) from error
