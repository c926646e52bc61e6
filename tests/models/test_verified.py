"""The record of what was measured."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_configs
import torch
from paths import BENCHMARKS
from tiny_models import build, inputs

from ffattr.decomposition.precision import output_tolerance
from ffattr.models import torch_encoder, verified
from ffattr.models.families.table import FAMILIES
from ffattr.models.verified import Layers, Row
from ffattr.pipeline.reproduce import reproduce

sys.path.insert(0, str(BENCHMARKS / "paper"))
import verify

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_record_covers_every_family_and_variant() -> None:
    record = verified.read()
    again = "run benchmarks/paper/verify.py again"
    assert {variant.model_type for variant in record.variants} == {*FAMILIES, *torch_encoder.NAMES}, again
    assert [variant.name for variant in record.variants] == list(tiny_configs.MODELS), again


def test_every_recorded_error_is_within_tolerance() -> None:
    record = verified.read()
    own = {output_tolerance(torch.float64, torch.float64, single) for single in (False, True)}
    for variant in record.variants:
        assert variant.tolerance in own
        assert 0 < variant.error <= variant.tolerance
        assert 0 <= variant.maps <= verify.MAPS
    for model in record.trained:
        assert 0 < model.error <= model.tolerance == output_tolerance(torch.float32, torch.float32, True)
        assert model.count > 1


def test_what_was_found_by_structure_is_what_the_sweep_found() -> None:
    """Types of no family, or variants that their family does not describe; all within what rounding explains."""
    structures = verified.read().structures
    sweep = json.loads((BENCHMARKS / "results" / "paper" / "sweep.json").read_text())
    mapped = [row for row in sweep if row["by"] == "structure"]
    assert [vars(one) for one in structures] == [{key: row[key] for key in vars(structures[0])} for row in mapped]
    assert len(structures) > 100
    for one in structures:
        assert 0 <= one.error <= output_tolerance(torch.float64, torch.float64, True)
        assert 0 <= one.maps <= verify.MAPS
        assert one.layers > 0
    rows = [verify.sweep.Swept("new", "mapped", "structure", 3, 1e-12, 1e-13), verify.sweep.Swept("old", "refused")]
    assert verify.keep_structures(rows, verified.read()).structures == (verified.Structure("new", 3, 1e-12, 1e-13),)


def test_the_record_describes_the_layers_as_they_are() -> None:
    """One variant of each row, and what the script makes of one of them."""
    record = verified.read()
    of_layers = {variant.layers: variant for variant in record.variants}
    for layers, variant in of_layers.items():
        assert verify.described(build(variant.name)) == layers
    (recorded,) = (variant for variant in record.variants if variant.name == "t5-gated")
    found = verify.variant("t5-gated")
    assert replace(found, error=recorded.error, maps=recorded.maps, backend=recorded.backend) == recorded
    assert 0 < found.error < 1e-13


def test_the_page_has_the_record() -> None:
    text = verify.PAGE.read_text(encoding="utf-8")
    written = text.split(verify.BEGIN)[1].split(verify.END)[0]
    assert written == verify.markdown(verified.read()), "run benchmarks/paper/verify.py --markdown"


def test_nothing_is_recorded_that_is_not_within_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "MAPS", -1.0)
    with pytest.raises(SystemExit, match="bert: an entry of a map is off by"):
        verify.variant("bert")
    found = reproduce(build("bert"), inputs("bert"))
    wrong = replace(found, layers=(found.layers[0], replace(found.layers[1], error=1e-3)))
    monkeypatch.setattr(verify, "reproduce", lambda model, given: wrong)
    with pytest.raises(SystemExit, match=r"bert: the output of layer 1 is off by 1\.0e-03"):
        verify.variant("bert")


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = verified.read()
    record.write(tmp_path / "record.json")
    assert verified.read(tmp_path / "record.json") == record
    assert list(tmp_path.iterdir()) == [tmp_path / "record.json"]
    assert (tmp_path / "record.json").read_text() == verified.RECORD.read_text()


def test_rows_group_what_is_alike() -> None:
    layers = Layers("text", False, "before", "dense", False, ("attn_heads", "attn", "atb"))
    gated = replace(layers, feed_forward="gated")
    one = replace(verified.read().variants[0], layers=layers, error=1e-12, maps=1e-13)
    variants = (
        replace(one, name="some-type", model_type="some_type", layers=gated),
        replace(one, name="other-dense", model_type="other", error=3e-12),
        replace(one, name="other-gated", model_type="other", layers=gated, maps=2e-13),
        replace(one, name="some-type-small", model_type="some_type"),
    )
    model = replace(verified.read().trained[0], layers=gated)
    assert verified.rows(verified.Record({}, variants, (model,))) == [
        Row(("other (dense)", "some_type (small)"), layers, 3e-12, 1e-13, ()),
        Row(("other (gated)", "some_type"), gated, 1e-12, 2e-13, (model,)),
    ]
    assert str(gated) == "norms before, gated"
    many = replace(gated, inputs="sound", encoder_decoder=True, parallel=True, norms="none")
    assert str(many) == "sound, encoder and decoder, no norms, parallel, gated"
