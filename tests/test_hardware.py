"""Tests of the reported capabilities of a CPU."""

import pytest
import torch

from reid.hardware import has_fast_bfloat16


@pytest.mark.parametrize("has_instructions", [True, False])
@pytest.mark.parametrize("has_library", [True, False])
def test_bfloat16_needs_instructions_and_a_library_for_them(monkeypatch, has_instructions, has_library):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_instructions)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_library)
    assert has_fast_bfloat16() == (has_instructions and has_library)
