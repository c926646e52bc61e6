"""Spearman's rank correlation and its standard error, against pandas, differences and random draws."""

import math

import pandas as pd
import pytest
import torch

from ffattr.analysis import spearman
from ffattr.analysis.ranks import standard_error


def rho(a, b):
    """Another way to the same number: pandas' average ranks, then its Pearson correlation."""
    return pd.DataFrame({"a": a.flatten().numpy(), "b": b.flatten().numpy()}).rank().corr().loc["a", "b"]


@pytest.mark.parametrize("levels", [0, 3, 10])
def test_spearman_is_pandas_with_ties_too(levels):
    generator = torch.Generator().manual_seed(levels)
    a, b = torch.rand(2, 7, 11, generator=generator)
    b = a + b
    if levels:
        a, b = (a * levels).floor(), (b * levels).floor()
    expected = rho(a, b)
    assert spearman(a, b) == pytest.approx(expected, abs=1e-12)


def test_spearman_sees_order_only():
    x = torch.linspace(-3, 3, 50)
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(x, -(x**3)) == pytest.approx(-1)


def test_spearman_where_it_is_not_defined():
    assert math.isnan(spearman(torch.ones(4), torch.arange(4)))
    assert math.isnan(spearman(torch.ones(1), torch.ones(1)))
    assert math.isnan(spearman(torch.tensor([1.0, math.nan, 3.0]), torch.arange(3.0)))
    assert math.isnan(spearman(torch.ones(0), torch.ones(0)))
    with pytest.raises(ValueError, match=r"equal shapes, got \[2\] and \[3\]"):
        spearman(torch.ones(2), torch.ones(3))


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("size", [300, 1500])
def test_the_standard_error_is_how_far_samples_lie(size, levels):
    """With ties, and without; of few of all pairs, and of half of them."""
    generator = torch.Generator().manual_seed(levels)
    a, b = torch.rand(2, 3000, generator=generator, dtype=torch.float64)
    b = a + b * a
    if levels:
        a, b = (a * levels).floor(), (b * levels).floor()
    found, errors = [], []
    for _ in range(200):
        some = torch.randperm(3000, generator=generator)[:size]
        found.append(spearman(a[some], b[some]))
        errors.append(standard_error(a[some], b[some], 3000))
    off = torch.tensor(found) - spearman(a, b)
    # Of 200 draws, a spread is known to 1 / sqrt(400) of itself: five per cent, three times.
    assert float(off.norm()) / math.sqrt(200) == pytest.approx(sum(errors) / 200, rel=0.15)


def test_the_delta_method_is_what_one_more_pair_changes():
    """By differences: the correlation of ranks of weighted pairs, with a little more weight on one of them."""
    a, b = torch.randint(5, (2, 40), generator=torch.Generator().manual_seed(2)).double()
    b = a + b

    def weighted(weights):
        f, g = (((x > x[:, None]).double().T + (x == x[:, None]).double() / 2) @ weights for x in (a, b))
        f, g = f - weights @ f, g - weights @ g
        return weights @ (f * g) / ((weights @ f**2) * (weights @ g**2)).sqrt()

    even = torch.full((40,), 1 / 40, dtype=torch.float64)
    assert weighted(even).item() == pytest.approx(spearman(a, b), abs=1e-12)
    step = 1e-5
    towards = [(1 - step) * even + step * one for one in torch.eye(40, dtype=torch.float64)]
    away = [(1 + step) * even - step * one for one in torch.eye(40, dtype=torch.float64)]
    change = torch.stack([(weighted(w) - weighted(v)) / (2 * step) for w, v in zip(towards, away, strict=True)])
    expected = float(change.norm()) / 40 * math.sqrt(1 - 40 / 100)
    assert standard_error(a, b, 100) == pytest.approx(expected, rel=1e-6)
