"""Checkpoints as safetensors files: tensors that cannot run code, and metadata as text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_DIGEST = "data_sha256"


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the tensors and the metadata, with a SHA-256 of all tensors that `read_safetensors` verifies."""
    separate = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(separate, file)  # to know the order of the tensors in the file, which the digest follows
    written, _ = _read(file)
    save_file(separate, file, {**metadata, _DIGEST: _digest_of(written)})


def read_safetensors(file: Path) -> dict[str, Any]:
    """Return the file in the form of a checkpoint: "model", "metadata" and, if recorded, "config" and "epoch".

    Raises:
        ValueError: The file is damaged.
        safetensors.SafetensorError: The file is not a safetensors file.
    """
    tensors, metadata = _read(file)
    if _DIGEST in metadata and metadata[_DIGEST] != (digest := _digest_of(tensors)):
        raise ValueError(f"the checksum of its data is {digest[:16]} and must be {metadata[_DIGEST][:16]}")
    content: dict[str, Any] = {"model": tensors, "metadata": metadata}
    if "config" in metadata:
        content["config"] = metadata["config"]
    if metadata.get("epoch", "").isdecimal():
        content["epoch"] = int(metadata["epoch"])
    return content


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors in the order of the file, and the metadata."""
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.offset_keys()}, opened.metadata() or {}


def _digest_of(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
