import json
import os
import subprocess
import sys

import pytest
import safetensors
import torch
from keeping import kept, some
from paths import environment
from safetensors.torch import load_file, save_file
from synthetic import HEADS, POST_LN, PRE_LN, attribution

from ffattr import Pool, Reduce, StackedAttribution, TopK, load
from ffattr.errors import FfattrError
from ffattr.results import files
from ffattr.results.files import FORMAT_VERSION, FileFormatError


def test_layer_is_an_alias_for_the_last_scope():
    attr = attribution(PRE_LN)
    assert attr["layer"] is attr.maps["atb_ln_ff_res"]
    assert attr["attn"] is attr.maps["attn"]


def test_an_unknown_scope_lists_the_computed_ones():
    with pytest.raises(KeyError, match=r"no scope 'atb_ln' here; computed: atb, atb_ff \(and the alias 'layer'\)"):
        attribution(("atb", "atb_ff"))["atb_ln"]


def test_repr_is_one_short_line():
    assert repr(attribution()).startswith("Attribution(3 layers, 2 x 6 tokens, 6 queries, scopes: attn_heads, ")


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


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), safetensors.SafetensorError("No space")])
@pytest.mark.parametrize("place", ["write", "rename"])
def test_a_save_that_dies_leaves_no_file_and_the_old_one_whole(tmp_path, monkeypatch, error, place):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def half(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise error

    def fail(*_):
        raise error

    monkeypatch.setattr(*((files, "save_file", half) if place == "write" else (os, "replace", fail)))
    with pytest.raises((OSError, KeyboardInterrupt, safetensors.SafetensorError)):
        attribution().save(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


FULL_DISK = """
import resource, sys
from synthetic import attribution
attr = attribution(tokens=100, real=(100,))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    attr.save(sys.argv[1])
except OSError as error:
    print(error)
"""


def test_a_disk_that_fills_up_is_an_os_error_and_leaves_no_file(tmp_path):
    pytest.importorskip("resource", reason="needs POSIX file size limits")
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "a.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    assert "could not write" in result.stdout
    assert "a.safetensors" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes, links and pipes")
def test_a_file_has_the_usual_mode_and_special_files_are_left_alone(tmp_path):
    plain, saved = tmp_path / "plain", tmp_path / "a.safetensors"
    plain.touch()
    link = tmp_path / "link"
    link.symlink_to(saved)
    attribution(("atb",)).save(link)
    assert link.is_symlink()
    assert saved.stat().st_mode == plain.stat().st_mode
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="is a device or a pipe"):
        attribution(("atb",)).save(pipe)
    assert pipe.is_fifo()


def test_where_a_file_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        attribution().save(tmp_path / "missing" / "a.safetensors")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        attribution().save(tmp_path)


def test_loading_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_loading_a_truncated_file(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    attribution().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileFormatError, match="cut off or damaged"):
        load(path)


def test_loading_something_else(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("hello, this is no safetensors file")
    with pytest.raises(FileFormatError, match="not a safetensors file"):
        load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(FileFormatError, match="not one that ffattr"):
        load(path)
    assert issubclass(FileFormatError, FfattrError)
    assert issubclass(FileFormatError, ValueError)


def _rewrite(path, **changes):
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata={**metadata, **changes})


def test_loading_a_newer_format_says_to_upgrade(tmp_path):
    path = tmp_path / "a.safetensors"
    attribution().save(path)
    _rewrite(path, format_version=str(FORMAT_VERSION + 1))
    with pytest.raises(FileFormatError, match=f"format version {FORMAT_VERSION + 1}, .* upgrade ffattr"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scopes": ["atb_ln"]}, "garbles 'maps.atb_ln'"),
        ({"layers": [0]}, "the map atb has shape"),
        ({"tokens": None}, "garbles"),
    ],
)
def test_loading_garbled_metadata(tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    attribution(("atb",)).save(path)
    with safetensors.safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["attribution"])
    _rewrite(path, attribution=json.dumps({**content, **change}))
    with pytest.raises(FileFormatError, match=message):
        load(path)
    _rewrite(path, attribution="{")
    with pytest.raises(FileFormatError, match="garbles"):
        load(path)


def test_to_pandas_has_every_real_pair_once():
    attr = attribution(("atb", "atb_ff"), queries=(0, 5))
    frame = attr.to_pandas()
    assert list(frame) == ["scope", "layer", "batch", "query", "key", "query_token", "key_token", "norm"]
    # Sequence 0 has 6 real keys and both queries; sequence 1 has 4 real keys, and query 5 is padding.
    assert len(frame) == 2 * 3 * (2 * 6 + 1 * 4)
    assert not frame.duplicated(["scope", "layer", "batch", "query", "key"]).any()
    for row in frame.itertuples():
        place = (attr.layers.index(row.layer), row.batch, attr.queries.index(row.query), row.key)
        assert row.norm == attr.maps[row.scope][place].item()
        assert row.query_token == attr.tokens[row.batch][row.query]
        assert row.key_token == attr.tokens[row.batch][row.key]


def test_to_pandas_with_heads():
    attr = attribution()
    frame = attr.to_pandas(["attn_heads", "layer"])
    heads = frame[frame.scope == "attn_heads"]
    assert len(heads) == 3 * HEADS * (36 + 16)
    assert frame[frame.scope == POST_LN[-1]]["head"].isna().all()
    row = heads.iloc[-1]
    assert row.norm == attr.maps["attn_heads"][-1, 1, row["head"], row.query, row.key].item()
    assert "head" not in attr.to_pandas("atb")


def test_plot_leaves_padding_out_and_names_what_it_shows():
    attr = attribution(queries=(1, 3, 5))
    axes = attr.plot("atb", layer=2, batch=1).axes[0]
    assert axes.get_title() == "atb, layer 2"
    assert [label.get_text() for label in axes.get_xticklabels()] == attr.tokens[1][:4]
    assert [label.get_text() for label in axes.get_yticklabels()] == [attr.tokens[1][1], attr.tokens[1][3]]
    shown = torch.as_tensor(axes.images[0].get_array())
    assert torch.equal(shown, attr.maps["atb"][1, 1][:2, :4])
    assert attr.plot("attn_heads", head=1).axes[0].get_title() == "attn_heads, layer 5, head 1"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer": 1}, IndexError, "layer 1 was not computed; computed: 0, 2, 5"),
        ({"layer": -4}, IndexError, "layer -4"),
        ({"batch": 2}, IndexError, "there are 2 sequences"),
        ({"scope": "attn_heads"}, ValueError, "has 2 heads; got head=None"),
        ({"scope": "attn_heads", "head": 2}, ValueError, "got head=2"),
        ({"head": 0}, ValueError, "summed over heads"),
        ({"scope": "nope"}, KeyError, "no scope 'nope'"),
    ],
)
def test_plot_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        attribution().plot(**arguments)


# --- what else may be kept of maps


def test_repr_says_what_was_kept():
    attr = some()
    endings = {TopK(3): "the 3 largest entries of each row)", Pool(2): "in blocks of 2 tokens)"}
    for asked, ending in endings.items():
        assert repr(kept(asked, attr)).endswith(f"atb_ff; {ending}")
    assert repr(kept(Reduce(lambda rows: 1), attr, cut=9)).endswith("atb_ff; no maps kept, 6 values reduced)")
    assert repr(attr).endswith("atb_ff)")


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


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (TopK(2), r"keep=TopK.*attr.largest\['atb'\].*keep='dense'"),
        (Reduce(len), "no map of atb was kept .keep=Reduce.: attr.reduced lists .*keep='dense'"),
    ],
)
def test_maps_that_were_not_kept(asked, message):
    attr = kept(asked if isinstance(asked, TopK) else Reduce(lambda rows: None), some())
    with pytest.raises(ValueError, match=message):
        attr["atb"]
    with pytest.raises(KeyError, match="computed: attn_heads, atb, atb_ff"):
        attr["nope"]
    if isinstance(asked, Reduce):
        for view in (attr.to_pandas, lambda: attr.plot("atb"), lambda: attr.to_pandas("atb")):
            with pytest.raises(ValueError, match="keep=Reduce"):
                view()


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


def test_to_pandas_of_the_largest_entries():
    attr = some(queries=(5, 0, 2, 4), causal=True)
    frame = kept(TopK(2), attr).to_pandas()
    whole = attr.to_pandas()
    assert list(frame) == list(whole)
    by = ["scope", "layer", "batch", "head", "query"]
    expected = whole[whole.norm > 0].sort_values([*by, "norm", "key"], ascending=[True] * 5 + [False, True])
    expected = expected.groupby(by, dropna=False, observed=True).head(2)
    found = frame.sort_values([*by, "norm", "key"], ascending=[True] * 5 + [False, True])
    assert 0 < len(found) < len(whole)
    for column in frame:
        assert found[column].astype(str).tolist() == expected[column].astype(str).tolist(), column


def test_to_pandas_of_blocks():
    attr = kept(Pool(2), some(("atb",)))
    frame = attr.to_pandas()
    # Sequence 0 has the tokens 0 1 3 4 5 6 in blocks 01 -3 45 6, sequence 1 has 2 3 4.
    assert len(frame) == 3 * (4 * 4 + 2 * 2)
    one = frame[(frame.layer == 2) & (frame.batch == 0) & (frame["query"] == 3)]
    assert one["key"].tolist() == [0, 3, 4, 6]
    assert one["key_token"].tolist() == ["tok0.0 … tok0.1", "tok0.3", "tok0.4 … tok0.5", "tok0.6"]
    assert set(one["query_token"]) == {"tok0.3"}
    assert one["norm"].tolist() == attr.maps["atb"][1, 0, 1].tolist()
    assert frame[frame.batch == 1]["query"].unique().tolist() == [2, 4]


def test_plots_of_what_was_kept():
    attr = some(queries=(5, 0, 2, 4))
    whole = attr.plot("atb", 2, 1).axes[0]
    top = kept(TopK(1), attr).plot("atb", 2, 1).axes[0]
    for ticks in ("get_xticklabels", "get_yticklabels"):
        assert [one.get_text() for one in getattr(top, ticks)()] == [one.get_text() for one in getattr(whole, ticks)()]
    shown = torch.as_tensor(top.images[0].get_array())
    maps = attr.maps["atb"][1, 1][[2, 3]][:, [2, 3, 4]]
    assert torch.equal(shown.amax(1), maps.amax(1))
    assert ((shown > 0).sum(1) == 1).all()
    assert torch.equal(torch.as_tensor(kept(TopK(9), attr).plot("atb", 2, -1).axes[0].images[0].get_array()), maps)
    pooled = kept(Pool(2), attr)
    axes = pooled.plot("attn_heads", 2, 1, head=1).axes[0]
    assert [one.get_text() for one in axes.get_xticklabels()] == ["tok1.2 … tok1.3", "tok1.4"]
    assert [one.get_text() for one in axes.get_yticklabels()] == ["tok1.2 … tok1.4"]
    assert torch.equal(torch.as_tensor(axes.images[0].get_array()), pooled.maps["attn_heads"][1, 1, 1][1:, 1:3])


def test_one_expert_of_the_largest_entries():
    attr = some(("atb", "atb_ff_experts"))
    generator = torch.Generator().manual_seed(3)
    shape = attr.maps["atb"].shape
    pairs = (attr.maps["atb"] > 0)[:, :, None]
    attr.maps["atb_ff_experts"] = torch.rand(*shape[:2], 2, *shape[2:], generator=generator).double() * pairs
    attr.experts = torch.tensor([1, 4]).expand(*shape[:3], 2).clone()
    attr.experts[:, :, 3] = torch.tensor([4, 0])
    cut = kept(TopK(20), attr)
    shown = torch.as_tensor(cut.plot("atb_ff_experts", 2, expert=4).axes[0].images[0].get_array())
    real = attr.mask[0].nonzero()[:, 0]
    assert torch.equal(shown, attr.of_expert(4)[1, 0][real][:, real])
    by = ["layer", "batch", "query", "key", "expert"]
    ours, theirs = (one.to_pandas("atb_ff_experts").query("norm > 0").sort_values(by) for one in (cut, attr))
    assert ours[[*by, "norm"]].to_numpy().tolist() == theirs[[*by, "norm"]].to_numpy().tolist()
    with pytest.raises(ValueError, match="keep=TopK"):
        cut.of_expert(4)
