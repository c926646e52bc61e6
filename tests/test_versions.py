"""Other versions of transformers: what they lack is named, never guessed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
import transformers
from packaging.version import Version
from paths import ROOT
from tiny_models import EVERY_FAMILY, build
from versions import OLDEST, PINNED

from ffattr.errors import UnsupportedModel
from ffattr.models.families.schema import Family, Fused, PerExpert, Shared
from ffattr.models.families.table import FAMILIES
from ffattr.models.huggingface import describe_pretrained
from ffattr.models.registry import resolve


def test_supported_versions() -> None:
    """`make test-oldest` runs what it says, which is what the package asks for and older than what `make test` runs."""
    assert f'models = ["transformers>={OLDEST.major}.{OLDEST.minor}"]' in (ROOT / "pyproject.toml").read_text()
    assert OLDEST < PINNED
    asked = OLDEST if "oldest" in os.environ.get("PYTHONPATH", "") else PINNED
    assert Version(transformers.__version__) == asked


@contextmanager
def renamed(root: Any, path: str) -> Iterator[None]:
    """As in a version in which the last part of ``path`` is called otherwise."""
    *parents, name = path.split(".")
    for parent in parents:
        root = getattr(root, parent)
    part = getattr(root, name)
    delattr(root, name)
    root.other = part
    try:
        yield
    finally:
        delattr(root, "other")
        setattr(root, name, part)


def paths(family: Family | Shared, experts: str | None = None) -> Iterator[str]:
    """Of everything that a layer has."""
    for field in fields(family):
        part = getattr(family, field.name)
        if field.name in ("layers", "positions", "heads", "active", "latent_width"):
            continue
        if isinstance(part, PerExpert):
            yield from (f"{experts}.{name}" for name in (part.weight, part.bias) if name is not None)
        elif isinstance(part, Shared):
            yield from paths(part)
        elif isinstance(part, Fused):
            yield from (path for path in (part.path, part.bias) if path is not None)
        elif isinstance(part, str):
            yield part


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_renamed_parts_are_named(name: str) -> None:
    """Every module, parameter and attribute that a family is known by."""
    model = build(name)
    entry = FAMILIES[model.config.model_type]
    found = entry(model.config) if callable(entry) else entry
    for family in (found,) if isinstance(found, Family) else (found.encoder, found.decoder):
        layers = family.layers if isinstance(family.layers, str) else family.layers[-1]
        layer = model.get_submodule(layers)
        for path in filter(None, (layers, family.positions)):
            with renamed(model, path), pytest.raises(UnsupportedModel, match=rf"Model has no '{re.escape(path)}'"):
                describe_pretrained(model, model.config.model_type)
        if isinstance(family.layers, str):
            layer = layer[-1]
        older = family.older is not None and not hasattr(layer.attention, "o_proj")
        of_layer = family.older if older and family.older is not None else family
        if resolve(model).layers[-1].shared is None:  # of which a configuration may have none
            of_layer = replace(of_layer, shared=None)
        for path in set(paths(of_layer, of_layer.experts)):
            with renamed(layer, path), pytest.raises(UnsupportedModel) as caught:
                describe_pretrained(model, model.config.model_type)
            assert "which its family is known to have" in str(caught.value)
            if family.dense is None and family.older is None:  # otherwise what else the layer may be is looked for
                assert f"(stopped at '{path.split('.')[-1]}' of" in str(caught.value)
    resolve(model)


@pytest.mark.parametrize(
    ("name", "setting"), [("gpt-neox", "use_parallel_residual"), ("bart", "encoder_attention_heads")]
)
def test_a_renamed_setting_is_named(name: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    monkeypatch.delattr(type(model.config), setting, raising=False)  # a default
    with renamed(model.config, setting), pytest.raises(UnsupportedModel, match=f"Config has no '{setting}', which its"):
        describe_pretrained(model, model.config.model_type)
