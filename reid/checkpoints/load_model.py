"""A trained model from a checkpoint, for programs that embed images in one process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from reid.checkpoints import weights
from reid.checkpoints.recorded_settings import settings_of_content
from reid.checkpoints.trained import build_trained, validate_weight_is_given
from reid.checkpoints.weight_file import read_weight_here
from reid.config.load import load_config
from reid.errors import SettingsError
from reid.evaluation.embedder import Embedder


def load_model(
    file_or_wandb_reference: str | Path, device: str | torch.device = "auto", *, overrides: Iterable[str] = ()
) -> Embedder:
    """Load a trained model with the settings recorded in its checkpoint.

    Args:
        file_or_wandb_reference: A checkpoint file, or wandb:ENTITY/PROJECT/ARTIFACT:ALIAS.
        device: "auto" for a GPU where there is one, or any device of torch.
        overrides: Settings over the recorded ones, KEY=VALUE each; for a checkpoint that records none, such as one of
            reid-strong-baseline, those that differ from the defaults.

    Raises:
        SettingsError: The device or a setting is not valid.
        WorldError: The file cannot be read, or its weights do not fit the settings.

    Example:
        >>> embedder = reid.load_model("runs/market1501/checkpoints/best_0120.pt", device="cuda:1")
        >>> embedding = embedder.embed(["a.jpg", "b.jpg"])  # float32 [2, D]
    """
    chosen = _device(device)
    settings = [*overrides, f"TEST.WEIGHT={file_or_wandb_reference}", f"MODEL.DEVICE={chosen.type}"]
    cfg = load_config(None, settings)
    validate_weight_is_given(cfg)
    _, content = read_weight_here(cfg)
    cfg = load_config(None, settings, recorded=settings_of_content(cfg, content))
    source = f"TEST.WEIGHT={cfg.TEST.WEIGHT}"
    weights.verify_settings(content, cfg, source, key="TEST.WEIGHT")
    return Embedder(build_trained(cfg, content, source, chosen), cfg)


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise SettingsError(
            f"device must be auto or a device of torch, got {device!r}; use cpu", key="device"
        ) from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"device must exist, but torch sees no GPU for {device!r}; use auto or cpu", key="device")
    return chosen
