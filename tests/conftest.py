"""Triton kernels run on the GPU where there is one and in Triton's interpreter elsewhere: decided before any import."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

SLOW_FIRST = ("test_resources.py", "test_examples.py", "test_device.py", "test_frames.py", "test_ff_norms.py")
"""Files of minutes: those that several processes begin with, so that none of them is left to the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in SLOW_FIRST)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
