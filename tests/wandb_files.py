"""Reader of .wandb files: a log in the format of LevelDB, of protocol buffers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32 * 1024
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(segment: Path) -> Iterator[Any]:
    """Yield the complete records in the .wandb file of a run segment."""
    from wandb.proto import wandb_internal_pb2

    (file,) = segment.glob("run-*.wandb")
    for payload in _payloads(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        yield record


def _payloads(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    offset, parts = 7, []
    while offset + 7 <= len(data):
        left = _BLOCK - offset % _BLOCK
        if left < 7:
            offset += left
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or offset + 7 + length > len(data):
            return
        parts.append(data[offset + 7 : offset + 7 + length])
        offset += 7 + length
        if kind in (_FULL, _LAST):
            yield b"".join(parts)
            parts = []


def of_kind(segment: Path, kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records(segment) if record.WhichOneof("record_type") == kind]


def rows(segment: Path) -> list[dict[str, Any]]:
    """Return the logged rows, without the names that W&B adds (with an underscore)."""
    logged = []
    for history in of_kind(segment, "history"):
        row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in history.item}
        logged.append({name: value for name, value in row.items() if not name.startswith("_")})
    return logged


def config(segment: Path) -> dict[str, Any]:
    """Return the run's configuration at its start."""
    (run,) = of_kind(segment, "run")[:1]
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in run.config.update}
