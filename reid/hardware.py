"""Capabilities of this machine's processor."""

from __future__ import annotations

import torch


def has_fast_bfloat16() -> bool:
    """Return whether this CPU multiplies matrices in bfloat16 faster than in float32."""
    return bool(torch.backends.mkldnn.is_available()) and torch.cpu._is_avx512_bf16_supported()  # type: ignore[no-untyped-call]
