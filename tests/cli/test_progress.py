"""The bar over layers."""

import io

import pytest
from rich.console import Console

from ffattr.cli import progress


def test_progress_says_how_fast_and_how_long():
    times = [0.0]
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, get_time=lambda: times[-1])
    with progress.show_progress(12_000, console) as update:
        for time in (10.0, 50.0, 90.0):  # the first layer comes early, all others take 40 s
            times.append(time)
            update(len(times) - 1, 6)
    shown = out.getvalue()
    assert "3/6" in shown
    assert "67 tokens/s" in shown  # 6000 in 90 s
    assert "0:02:00" in shown


def test_no_progress_where_nobody_watches():
    out = io.StringIO()
    with progress.show_progress(12, Console(file=out)) as update:
        update(1, 2)
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [(0.0123, "0.012 tokens/s"), (9.5, "9.5 tokens/s"), (10.4, "10 tokens/s"), (12_346, "12,346")],
)
def test_rates_have_the_digits_that_matter(tokens, shown):
    times = [0.0]
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, get_time=lambda: times[-1])
    with progress.show_progress(tokens * 4, console) as update:
        times.append(2.0)
        update(1, 2)
    assert f" {shown}" in out.getvalue()


def test_the_bar_is_gone_when_an_error_comes_through():
    out = io.StringIO()

    def fail():
        with progress.show_progress(12, Console(file=out, force_terminal=True, width=120)) as update:
            update(1, 3)
            raise ValueError("layer 1")

    with pytest.raises(ValueError, match="layer 1"):
        fail()
    assert out.getvalue().endswith("\x1b[2K")  # its line is erased
