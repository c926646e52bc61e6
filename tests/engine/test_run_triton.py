"""Whole maps by the Triton backend, on the GPU or in Triton's interpreter, and its kernels as operators of PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_cases import Engine
from triton_cases import (
    DEVICE,
    function,
    needs_float8,
)

from ffattr import ops
from ffattr.ops import contract

# A lane that is not selected may well divide by zero: the interpreter's NumPy warns.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("poisoned", "one_thread", "rounded_as_on_gpus"),
]


class TestTriton(Engine):
    backend = "triton"
    device = DEVICE

    def needs_float8(self, dtype: torch.dtype) -> None:
        needs_float8(dtype)

    @pytest.fixture(scope="module")
    def operators(self) -> Iterator[Any]:
        """In a library of their own."""
        library = torch.library.Library("ffattr_triton_test", "DEF")
        for name, schema in ops.SCHEMAS.items():
            library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
            library.impl(name, function(name), DEVICE.type.upper())
            torch.library.register_fake(f"ffattr_triton_test::{name}", contract._FAKES[name], lib=library)
        yield torch.ops.ffattr_triton_test
        library._destroy()
