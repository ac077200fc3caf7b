"""Checkpoints as safetensors files: tensors that cannot run code, and what is known about them as text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

_DIGEST = "data_sha256"


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes the tensors with the metadata, and a SHA-256 of all their bytes that `read_safetensors` checks."""
    separate = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    digest = _digest_of_data(safetensors.torch.save(separate))
    file.write_bytes(safetensors.torch.save(separate, {**metadata, _DIGEST: digest}))


def read_safetensors(file: Path) -> dict[str, Any]:
    """The file as one of our checkpoints: "model", and where they are known "config", "epoch" and "metadata".

    Raises:
        ValueError: it is damaged.
        safetensors.SafetensorError: it is no such file.
    """
    blob = file.read_bytes()
    tensors = safetensors.torch.load(blob)
    metadata: dict[str, str] = json.loads(blob[8 : 8 + _header_length(blob)]).get("__metadata__", {})
    if metadata.get(_DIGEST, digest := _digest_of_data(blob)) != digest:
        raise ValueError(f"the checksum of its data is {digest[:16]} and must be {metadata[_DIGEST][:16]}")
    content: dict[str, Any] = {"model": tensors, "metadata": metadata}
    if "config" in metadata:
        content["config"] = metadata["config"]
    if metadata.get("epoch", "").isdecimal():
        content["epoch"] = int(metadata["epoch"])
    return content


def _digest_of_data(blob: bytes) -> str:
    return hashlib.sha256(memoryview(blob)[8 + _header_length(blob) :]).hexdigest()


def _header_length(blob: bytes) -> int:
    """Of the JSON between these 8 bytes and the data."""
    return int.from_bytes(blob[:8], "little")
