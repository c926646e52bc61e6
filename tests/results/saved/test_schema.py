"""What is no result of ffattr is refused before anything is made of it, however well it is wrapped."""

import json

import pytest
import safetensors
import torch
from keeping import kept, some
from made_contributions import contributions
from safetensors.torch import load_file, save_file
from synthetic import attribution

import ffattr
from ffattr import Pool, StackedAttribution, TopK
from ffattr.errors import FileFormatError
from ffattr.results.saved.schema import read_texts


def rewrite(path, tensors=None, content=None, description=None):
    """Changes parts of a file; of the checksum nothing is kept, as in files of older versions."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata.pop("checksum", None)
    found = {**json.loads(metadata["attribution"]), **(content or {})}
    metadata["attribution"] = json.dumps(found) if description is None else description
    save_file({**load_file(path), **(tensors or {})}, path, metadata=metadata)


CONTENT = [
    {"layers": {"0": 1}},
    {"layers": [0, 2, 10**30]},
    {"layers": [True, 2, 5]},
    {"queries": [0, 1, float("nan"), 3, 4, 5]},
    {"queries": [0, 1, 2, 3, 4, 6]},
    {"queries": "012345"},
    {"tokens": "x" * 5_000_000},
    {"tokens": [["a"] * 6]},
    {"tokens": [["a"] * 5, ["a"] * 5]},
    {"tokens": [["a"] * 6, [None] * 6]},
    {"key_tokens": [["a"] * 7] * 2},
    {"scopes": []},
    {"scopes": ["atb", "atb"]},
    {"scopes": "atb"},
    {"plan": 5},
    {"arguments": ["ig"]},
    {"block": 0},
    {"block": "2"},
    {"stacks": {"nowhere": {}}},
    {"stacks": []},
    {"stacks": {"encoder": 5}},
    {"kind": "contributions"},
]


@pytest.mark.parametrize("content", CONTENT, ids=lambda content: str(content)[:40])
def test_a_description_that_says_something_else_is_refused(tmp_path, content):
    path = tmp_path / "a.safetensors"
    attribution(("atb",)).save(path)
    rewrite(path, content=content)
    with pytest.raises(FileFormatError, match=r"a\.safetensors"):
        ffattr.load(path)


TENSORS = [
    {"mask": torch.ones(2, 6)},
    {"mask": torch.ones(12, dtype=torch.bool)},
    {"mask": torch.ones(2, 5, dtype=torch.bool)},
    {"error": torch.zeros(3)},
    {"bias.atb": torch.zeros(3, 2, 5)},
    {"maps.atb": torch.zeros(3, 2, 6, 6, dtype=torch.int64)},
    {"maps.atb": torch.zeros(3, 2, 2, 6, 6)},
    {"maps.atb": torch.zeros(())},
    {"key_mask": torch.ones(2, 4, dtype=torch.bool)},
    {"groups": torch.full((2, 6), 6)},
    {"groups": torch.zeros(2, 6)},
    {"experts": torch.zeros(3, 2, 6, 2, dtype=torch.int64)},
    {"shares": torch.zeros(3, 2, 6, 2)},
    {"sketch_error.atb": torch.zeros(3, 3)},
]


@pytest.mark.parametrize("tensors", TENSORS, ids=lambda tensors: str(next(iter(tensors))))
def test_tensors_of_other_shapes_and_dtypes_are_refused(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    attribution(("atb",)).save(path)
    rewrite(path, tensors)
    with pytest.raises(FileFormatError, match=r"a\.safetensors"):
        ffattr.load(path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"top.atb.keys": torch.full((3, 2, 7, 2), 7, dtype=torch.int32)},
        {"top.atb.keys": torch.full((3, 2, 7, 2), -2, dtype=torch.int32)},
        {"top.atb.keys": torch.zeros(3, 2, 7, 2)},
        {"top.atb.rest": torch.zeros(3, 2, 6)},
        {"top.atb.total": torch.zeros(3, 2, 7, 1)},
    ],
)
def test_kept_entries_are_checked_too(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    kept(TopK(2), some(("atb",))).save(path)
    assert ffattr.load(path).largest["atb"].values.shape == (3, 2, 7, 2)
    rewrite(path, tensors)
    with pytest.raises(FileFormatError, match=r"(the keys of|the rest of|the total of) atb"):
        ffattr.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"content": {"targets": {"0": "a"}}},
        {"content": {"targets": [["a", "b"]]}},
        {"content": {"scope": 3}},
        {"content": {"encoder": []}},
        {"content": {"cross_flow": "dense"}},
        {"content": {"cross_flow": {"block": None}}},
        {"tensors": {"positions": torch.zeros(2, 2)}},
        {"tensors": {"positions": torch.full((2, 2), 99)}},
        {"tensors": {"residual": torch.zeros(2, 3, 2)}},
        {"tensors": {"cross_scores": torch.zeros(2, 4, 2, 3)}},
        {"tensors": {"maps.flow": torch.zeros(1, 2, 6, 6)}},
        {"tensors": {"value": torch.zeros(2, 2, dtype=torch.int32)}},
    ],
    ids=str,
)
def test_contributions_are_checked(tmp_path, change):
    path = tmp_path / "a.safetensors"
    contributions(flow=True).save(path)
    rewrite(path)
    assert ffattr.load(path).flow is not None
    rewrite(path, **change)
    with pytest.raises(FileFormatError, match=r"a\.safetensors"):
        ffattr.load(path)


def test_files_of_all_kinds_pass(tmp_path):
    attr = attribution()
    made = [attr, attr.to_words(), kept(Pool(2), some()), kept(TopK(9), some()), contributions(flow="heads")]
    made += [StackedAttribution.of({"encoder": attr, "decoder": attr}), contributions(encoder=True).to_words()]
    for one in made:
        one.save(tmp_path / "a.safetensors")
        assert repr(ffattr.load(tmp_path / "a.safetensors")) == repr(one)


def test_half_characters_become_question_marks():
    assert read_texts([["a", "\ud83d"], []]) == [["a", "?"], []]
