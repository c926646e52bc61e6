"""Any arguments to the views of results and to analyses, of made-up numbers: an own error or something to look at."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import hypothesis
import matplotlib.pyplot as plt
import torch
from hostile import examples, judge, odd
from hypothesis import strategies as st
from keeping import kept, some
from made_contributions import contributions
from synthetic import PRE_LN, attribution

import ffattr
from ffattr import Pool, Reduce, StackedAttribution, TopK, analysis, study


@functools.cache
def results() -> dict[str, Any]:
    attr = attribution()
    return {
        "attribution": attr,
        "pre-LN": attribution(PRE_LN, layers=(0, 1), causal=True),
        "rows": attribution(("atb", "atb_ff"), queries=(1, 3)),
        "top": kept(TopK(2), some(("atb", "atb_ff"))),
        "pool": kept(Pool(2), some(("atb", "atb_ff"))),
        "reduced": kept(Reduce(lambda rows: rows.layer), some(("atb", "atb_ff"))),
        "stacked": StackedAttribution.of({"encoder": attr, "decoder": attr}),
        "contributions": contributions(),
        "by head": contributions(flow="heads", encoder=True),
    }


METHODS: dict[str, tuple[str, ...]] = {
    "to_pandas": ("scopes",),
    "to_xarray": ("scopes",),
    "top": ("k", "scope", "own", "layer"),
    "compare": ("other", "scopes"),
    "to_words": ("keys", "queries", "words"),
    "to_sentences": (),
    "add_targets": ("targets", "name"),
    "select": ("target",),
    "plot": ("scope", "layer", "batch", "head", "target", "expert"),
    "plot_scopes": ("layer", "batch"),
    "plot_amplification": ("batch",),
    "plot_arcs": ("query", "scope", "other", "layer", "batch"),
    "plot_flow": ("layer", "target", "batch", "head", "cross"),
    "of_expert": ("number", "scope"),
    "to_html": ("path", "scopes", "title", "limit"),
    "save": ("path",),
    "_repr_html_": (),
}
PATHS = ("a.html", "", ".", "/nowhere/a", "a\0b", "x" * 300, b"a.html", 5, None)
KNOWN: dict[str, Any] = {
    "scope": st.sampled_from(["layer", "atb", "atb_ff", "attn_heads", "encoder.atb", "nowhere"]),
    "scopes": st.sampled_from([None, "layer", ["atb", "layer"], [], [("atb", "atb_ff")]]),
    "layer": st.sampled_from([0, -1, 2, 5, 99, None]),
    "batch": st.sampled_from([0, 1, -1, 2]),
    "k": st.sampled_from([1, 3, 10**6]),
    "other": st.deferred(lambda: st.sampled_from(list(results().values()))),
    "path": st.sampled_from(PATHS),
    "query": st.sampled_from([0, 3, -1, 99]),
    "limit": st.sampled_from([10**6, 10, 10**9]),
    "words": st.sampled_from([None, [[0] * 6] * 2, [[0]], [["a"] * 6] * 2]),
}


@st.composite
def views(draw: Any) -> tuple[Any, str, dict[str, Any]]:
    result = draw(st.sampled_from(list(results().values())))
    method = draw(st.sampled_from([name for name in METHODS if hasattr(result, name)]))
    names = draw(st.lists(st.sampled_from(METHODS[method]), unique=True)) if METHODS[method] else []
    given = {name: draw(st.one_of(KNOWN[name], odd) if name in KNOWN else odd) for name in names}
    return result, method, given


def takes(method: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what this kind of result has no argument for: Python's own message says that."""
    names = method.__func__.__code__.co_varnames[: method.__func__.__code__.co_argcount + 9]
    return {name: value for name, value in given.items() if name in names}


def test_views(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)

    @hypothesis.given(views())
    @examples(200)
    def attack(view: tuple[Any, str, dict[str, Any]]) -> None:
        result, name, given = view
        method = getattr(result, name)
        options = takes(method, given)
        if name in ("to_html", "save"):
            options.setdefault("path", "a.html")
        elif name == "plot_arcs":
            options.setdefault("query", 0)
        elif name in ("compare", "select", "of_expert"):
            first = {"compare": "other", "select": "target", "of_expert": "number"}[name]
            options.setdefault(first, result if name == "compare" else 0)
        judge("results", lambda: method(**options))
        plt.close("all")
        hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
        assert not hidden, f"{name} left {hidden}"

    attack()


@functools.cache
def decomposed() -> Any:
    shape = (2, 1, 3, 3, 4)
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bias = torch.zeros(2, 1, 3, 4, dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    return ffattr.Vectors(values, bias, values.sum(-2), [["a", "b", "c"]], (0, 1), (0, 1, 2), "atb", mask)


ANALYSES = sorted({*analysis.__all__} - {"Several"})


@hypothesis.given(
    st.sampled_from(ANALYSES),
    st.lists(st.one_of(st.deferred(lambda: st.sampled_from([*results().values(), decomposed()])), odd), max_size=3),
)
@examples(200)
def test_analyses(name: str, given: list[Any]) -> None:
    """Arguments that are missing or too many are Python's own matter."""
    call = getattr(analysis, name)
    try:
        inspect.signature(call).bind(*given)
    except TypeError:
        return
    judge("analyses", lambda: call(*given))


@hypothesis.given(st.deferred(lambda: st.sampled_from([*results().values()])), odd, st.booleans())
@examples(20)
def test_studies(result: Any, value: Any, swapped: bool) -> None:
    given = ("a study", value) if swapped else (value, result)
    judge("analyses", lambda: study.of_maps(*given))
