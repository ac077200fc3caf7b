"""Reads what wandb has written on the disk: a log as LevelDB's, of protocol buffers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32 * 1024
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(piece: Path) -> Iterator[Any]:
    """The records in the .wandb file of a run's folder, as far as they are whole."""
    from wandb.proto import wandb_internal_pb2

    (file,) = piece.glob("run-*.wandb")
    for payload in _payloads(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        yield record


def _payloads(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    place, parts = 7, []
    while place + 7 <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or place + 7 + length > len(data):
            return
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (_FULL, _LAST):
            yield b"".join(parts)
            parts = []


def of_kind(piece: Path, kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records(piece) if record.WhichOneof("record_type") == kind]


def rows(piece: Path) -> list[dict[str, Any]]:
    """What was logged, without what W&B adds (names that begin with an underscore)."""
    found = []
    for history in of_kind(piece, "history"):
        row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in history.item}
        found.append({name: value for name, value in row.items() if not name.startswith("_")})
    return found


def config(piece: Path) -> dict[str, Any]:
    """The run's configuration as it was at the begin."""
    (run,) = of_kind(piece, "run")[:1]
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in run.config.update}
