"""Callbacks that call ffattr again, and threads that share a model: each gets what it would get alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny_models
import torch
from hostile import FUZZ, describe_world, note

import ffattr

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_callback_may_begin_anew() -> None:
    """One map is computed inside the other, of the same model, while its hooks are there."""
    model, given = tiny_models.build("llama"), tiny_models.inputs("llama", 1, 6)
    other = tiny_models.inputs("llama", 1, 4, seed=3)
    expected = [ffattr.attribute(model, one, scopes="all") for one in (given, other)]
    before, within = describe_world(model), []

    def begin_anew(done: int, of: int) -> None:
        within.append(ffattr.attribute(model, other, scopes="all"))
        within.append(ffattr.vectors(model, other, scope="atb", layers=[0]))
        model(**other)

    found = ffattr.attribute(model, given, scopes="all", progress=begin_anew)
    for scope in found.scopes:
        assert torch.equal(found[scope], expected[0][scope])
        assert torch.equal(within[0][scope], expected[1][scope])
    assert describe_world(model) == before


def test_threads_of_every_kind_at_once() -> None:
    models = {name: tiny_models.build(name) for name in ("gpt2", "mixtral", "mpnet")}
    head = tiny_models.build("gpt2", head="LMHeadModel")
    given = {name: tiny_models.inputs(name, 1, 5) for name in models}

    def work(kind: int) -> Any:
        name = list(models)[kind % 3]
        if kind % 4 == 0:
            return ffattr.contributions(head, given["gpt2"], target=3).scores
        if kind % 4 == 1:
            return ffattr.vectors(models[name], given[name], scope="atb").values
        return ffattr.attribute(models[name], given[name], scopes="all")["layer"]

    expected = [work(kind) for kind in range(12)]
    before = {name: describe_world(model) for name, model in models.items()}
    with ThreadPoolExecutor(6) as pool:
        for _ in range(max(1, FUZZ // 100)):
            for one, other in zip(expected, pool.map(work, range(12)), strict=True):
                note("threads", torch.equal(one, other), "another result than alone")
    assert {name: describe_world(model) for name, model in models.items()} == before
    assert threading.active_count() < 20
