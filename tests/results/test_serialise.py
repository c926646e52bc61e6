"""Attributions of all kinds saved and loaded, and files whose description does not fit."""

import json

import pytest
import safetensors
import torch
from keeping import kept, rewrite_metadata, some
from synthetic import attribution

from ffattr import Pool, Reduce, StackedAttribution, TopK, load
from ffattr.errors import FileFormatError
from ffattr.results import files
from ffattr.results.serialise import to_parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_saved_file_loads_as_it_was(tmp_path, dtype):
    attr = attribution(queries=(1, 3))
    attr.maps = {scope: values.to(dtype) for scope, values in attr.maps.items()}
    path = tmp_path / "maps.safetensors"
    attr.save(path)
    loaded = load(path)
    for ours, theirs in ((attr.maps, loaded.maps), (attr.bias, loaded.bias)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert torch.equal(attr.mask, loaded.mask)
    assert torch.equal(attr.error, loaded.error)
    for name in ("tokens", "layers", "queries", "scopes", "plan"):
        assert getattr(attr, name) == getattr(loaded, name)
    assert loaded.arguments == {"ig": "exact", "dtype": "torch.float32", "causal": False}
    assert [file.name for file in tmp_path.iterdir()] == ["maps.safetensors"]


def test_saving_takes_views_and_shared_tensors(tmp_path):
    attr = attribution(("atb", "atb_ff"))
    whole = torch.rand(2, *attr.maps["atb"].shape)
    attr.maps = {"atb": whole[0].transpose(-1, -2), "atb_ff": whole[1]}
    attr.bias["atb"] = attr.bias["atb_ff"]
    attr.save(tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors")
    assert all(torch.equal(attr.maps[scope], loaded.maps[scope]) for scope in attr.scopes)


def test_text_of_any_script_survives(tmp_path):
    attr = attribution(("atb",), tokens=3, real=(3,))
    attr.tokens = [["Ġthe", "日本", '"\n\\']]
    attr.save(tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors").tokens == attr.tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scopes": ["atb_ln"]}, "garbles 'bias.atb_ln'"),
        ({"layers": [0]}, r"error has shape \[3, 2\], expected \[1, 2\]"),
        ({"tokens": None}, "garbles"),
    ],
)
def test_loading_garbled_metadata(tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    attribution(("atb",)).save(path)
    with safetensors.safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["attribution"])
    rewrite_metadata(path, attribution=json.dumps({**content, **change}))
    with pytest.raises(FileFormatError, match=message):
        load(path, verify=False)
    rewrite_metadata(path, attribution="{")
    with pytest.raises(FileFormatError, match="garbles"):
        load(path, verify=False)


def _same(first, second):
    assert first.maps.keys() == second.maps.keys()
    assert all(torch.equal(first.maps[scope], second.maps[scope]) for scope in first.maps)
    assert first.largest.keys() == second.largest.keys()
    for scope, top in first.largest.items():
        for part in ("values", "keys", "rest", "total"):
            ours, theirs = getattr(top, part), getattr(second.largest[scope], part)
            assert torch.equal(ours, theirs)
            assert ours.dtype == theirs.dtype
    assert (first.block, first.scopes) == (second.block, second.scopes)
    assert all(torch.equal(first.bias[scope], second.bias[scope]) for scope in first.scopes)


@pytest.mark.parametrize("asked", [TopK(3), TopK(20), Pool(2), Pool(3)])
def test_what_was_kept_is_saved(tmp_path, asked):
    attr = kept(asked, some(queries=(5, 0, 2)))
    attr.save(tmp_path / "a.safetensors")
    _same(attr, load(tmp_path / "a.safetensors"))
    stacks = StackedAttribution.of({"encoder": kept(asked, some()), "decoder": attr})
    assert stacks.scopes == tuple(f"{stack}.{scope}" for stack in ("encoder", "decoder") for scope in attr.scopes)
    stacks.save(tmp_path / "b.safetensors")
    loaded = load(tmp_path / "b.safetensors")
    _same(stacks, loaded)
    _same(stacks.stacks["encoder"], loaded.stacks["encoder"])


def test_a_reduced_result_is_not_saved(tmp_path):
    attr = kept(Reduce(lambda rows: rows.layer), some())
    stacks = StackedAttribution.of({"encoder": attr, "decoder": attr})
    assert stacks.reduced == attr.reduced * 2
    for result in (attr, stacks):
        with pytest.raises(ValueError, match=r"nothing to save of .*keep=Reduce keeps no maps. Save .*attr.reduced"):
            result.save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["values", "keys", "block"])
def test_loading_what_does_not_fit(tmp_path, change):
    path = tmp_path / "a.safetensors"
    attr = kept(Pool(2) if change == "block" else TopK(2), some(("atb",)))
    if change == "block":
        attr.kept.block = 3
    else:
        tensor = getattr(attr.largest["atb"], change)
        object.__setattr__(attr.largest["atb"], change, tensor[:, :, 1:])
    attr.save(path)
    with pytest.raises(FileFormatError, match=r"(the map|the top of|the keys of) atb has shape .*, expected \[3, 2, "):
        load(path)


def test_an_older_file_is_read(tmp_path):
    """Of the first version of the format, without what came later."""
    attr = attribution(("atb",))
    tensors, content = to_parts(attr)
    del content["block"]
    files.write(tmp_path / "a.safetensors", tensors, content)
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["format_version"] == "1"
    assert load(tmp_path / "a.safetensors").block is None
