"""What vectors are reduced to: against the definition, with what cancels, and rows of nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ffattr.ops.reduction import normalise_rows, reduce_vectors


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_norms() -> None:
    vectors = numbers(3, 4, 7)
    torch.testing.assert_close(reduce_vectors(vectors, "l2"), vectors.square().sum(-1).sqrt(), rtol=1e-14, atol=0)
    torch.testing.assert_close(reduce_vectors(vectors, "l1"), vectors.abs().sum(-1), rtol=1e-14, atol=0)


def test_alti_is_the_difference_of_two_distances() -> None:
    vectors, total = numbers(50, 9, 7), numbers(50, 7, seed=1)
    total[0, 0] = 0
    expected = total.abs().sum(-1)[:, None] - (total[:, None] - vectors).abs().sum(-1)
    assert (expected > 0).any()
    assert (expected < 0).any()
    found = reduce_vectors(vectors, "alti", total[:, None])
    torch.testing.assert_close(found, expected.clamp_min(0), rtol=0, atol=1e-13)


def test_alti_of_a_small_vector_beside_a_large_whole() -> None:
    """Of which the difference of distances would have no digit left."""
    total = 1e6 * torch.ones(8)
    vectors = torch.tensor([1e-3, 2e-3]).repeat(4)
    naive = total.abs().sum() - (total - vectors).abs().sum()
    assert abs(float(naive) - 12e-3) > 1e-3
    assert float(reduce_vectors(vectors, "alti", total)) == pytest.approx(12e-3, rel=1e-6)


def test_nan_stays() -> None:
    total, vectors = torch.ones(3), torch.eye(3)
    vectors[1, 2] = torch.nan
    assert reduce_vectors(vectors, "alti", total).isnan().tolist() == [False, True, False]
    assert reduce_vectors(vectors, "alti", total * torch.tensor([1, 1, torch.nan])).isnan().all()


def test_rows_of_several_parts_are_divided_by_the_sum_of_all() -> None:
    one, other = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[4.0], [0.0]])
    assert normalise_rows([one, other]).tolist() == [8.0, 1.0]
    assert one.tolist() == [[0.125, 0.375], [0.0, 0.0]]
    assert other.tolist() == [[0.5], [0.0]]
