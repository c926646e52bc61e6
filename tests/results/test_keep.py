"""What is kept of maps, against the whole maps; files that are written while they are computed."""

import errno
import os
import subprocess
import sys

import pytest
import safetensors
import torch
from keeping import SCOPES, feed, kept, opened, result_of, row, some
from paths import environment
from safetensors.torch import load_file
from synthetic import attribution
from two_devices import THERE, TwoDevices

import ffattr
from ffattr import Dense, Pool, Reduce, TopK, load
from ffattr.errors import NonFiniteError
from ffattr.results import files, keep
from ffattr.results.files import FileFormatError
from ffattr.results.serialise import to_parts

pytestmark = pytest.mark.usefixtures("one_thread")

CUTS = [{"cut": 1}, {"cut": 4}, {"cut": 9, "backwards": True}, {"cut": 2, "backwards": True}]


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("queries", [None, (5, 0, 2, 2)])
def test_dense_is_the_maps(how, queries):
    attr = some(queries=queries)
    found = kept(Dense(), attr, **how)
    assert found.maps.keys() == attr.maps.keys()
    assert all(torch.equal(found.maps[scope], attr.maps[scope]) for scope in SCOPES)
    assert (found.largest, found.reduced, found.block) == ({}, [], None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dense_in_another_dtype(dtype):
    attr = some(dtype=torch.float32)
    found = kept(Dense(dtype), attr)
    assert all(torch.equal(found.maps[scope], attr.maps[scope].to(dtype)) for scope in SCOPES)


@pytest.mark.parametrize(
    ("kept_in", "computed", "largest", "advice"),
    [
        (torch.float16, torch.float32, 65520.0, "keep the maps in torch.bfloat16"),
        (torch.float32, torch.float64, 1e39, "keep the maps in torch.float64"),
    ],
)
def test_a_norm_beyond_the_range_is_an_error_that_says_what_is_wide_enough(kept_in, computed, largest, advice):
    attr = some(("atb",), dtype=computed)
    attr.maps["atb"][2, 1, 3, 2] = largest
    with pytest.raises(NonFiniteError, match=rf"a norm of atb is .*beyond the range of {kept_in}.*{advice}"):
        kept(Dense(kept_in), attr)
    attr.maps["atb"][2, 1, 3, 2] = torch.finfo(kept_in).max
    assert kept(Dense(kept_in), attr).maps["atb"].isfinite().all()


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("k", [1, 3, 6, 9])
def test_top_is_the_largest_of_every_row_with_ties_in_order(k, how):
    attr = some(causal=True)
    found = kept(TopK(k), attr, **how)
    assert found.maps == {}
    every = torch.arange(7)
    for scope in SCOPES:
        top, maps = found.largest[scope], attr.maps[scope]
        assert top.keys.dtype == torch.int32
        assert top.values.shape == (*maps.shape[:-1], k)
        for at in torch.cartesian_prod(*(torch.arange(n) for n in maps.shape[:-1])).tolist():
            values, keys = row(maps[tuple(at)], every, k)
            assert (top.values[tuple(at)].tolist(), top.keys[tuple(at)].tolist()) == (values, keys)
        torch.testing.assert_close(top.total, maps.sum(-1), rtol=1e-14, atol=0)
        dense = top.dense(7)
        assert torch.equal(torch.where(dense > 0, dense, maps), maps)
        assert torch.equal((dense > 0).sum(-1), (maps > 0).sum(-1).clamp_max(k))
        torch.testing.assert_close(top.rest, (maps - dense).norm(dim=-1), rtol=1e-14, atol=0)


def test_equal_entries_give_the_lowest_positions():
    attr = some(("atb",))
    attr.maps["atb"][0, 0, 1] = torch.tensor([1.0, 2, 0, 2, 1, 1, 2])
    top = kept(TopK(4), attr).largest["atb"]
    assert top.keys[0, 0, 1].tolist() == [1, 3, 6, 0]
    long = torch.ones(1, 1, 2, 5000)  # as long as where topk changes its algorithm
    sink = TopK(40).open({"atb": (1, 1, 2, 5000)}, torch.float32, torch.device("cpu"), [0], [0, 1])
    sink.add_rows(0, 0, torch.arange(2), torch.arange(5000), {"atb": long[0, 0]})
    assert sink.finish().largest["atb"].keys[0, 0].tolist() == [list(range(40))] * 2


def test_top_says_what_is_wrong():
    attr = some(("atb",))
    top = kept(TopK(2), attr).largest["atb"]
    with pytest.raises(ValueError, match="keys=6, but there are entries up to position 6"):
        top.dense(6)
    assert kept(TopK(2), some(("atb",), queries=())).largest["atb"].dense(0).shape == (3, 2, 0, 0)
    attr.maps["atb"][0, 0, 1, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="scope atb has norms that are NaN"):
        kept(TopK(2), attr)


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("queries", [None, (6, 0, 2, 2, 5)])
@pytest.mark.parametrize("block", [1, 2, 3, 10])
def test_pool_is_the_mean_over_real_pairs(block, queries, how):
    attr = some(queries=queries)
    found = kept(Pool(block), attr, **how)
    assert found.block == block
    rows = torch.tensor(attr.queries)
    for scope in SCOPES:
        maps = attr.maps[scope]
        for batch in range(2):
            for i, some_rows in enumerate(torch.arange(len(rows)).split(block)):
                for j, some_keys in enumerate(torch.arange(7).split(block)):
                    n = some_rows[attr.mask[batch][rows[some_rows]]]
                    t = some_keys[attr.mask[batch][some_keys]]
                    of = maps[:, batch][..., n, :][..., t]
                    mean = of.mean((-1, -2)) if of.numel() else torch.zeros(of.shape[:-2], dtype=of.dtype)
                    torch.testing.assert_close(found.maps[scope][:, batch, ..., i, j], mean, rtol=1e-14, atol=0)
        assert found.maps[scope].shape[-2:] == (-(-len(rows) // block), -(-7 // block))


def test_pooled_maps_are_the_same_however_rows_come():
    attr = some(("atb",), dtype=torch.float32)
    attr.maps["atb"] = attr.maps["atb"] * torch.rand(attr.maps["atb"].shape)
    first, second = (kept(Pool(4), attr, **how).maps["atb"] for how in CUTS[:2])
    assert first.dtype == torch.float32
    torch.testing.assert_close(first, second, rtol=1e-7, atol=0)


def test_maps_by_expert_are_not_pooled():
    with pytest.raises(ValueError, match=r"Pool\(block=2\).*atb_ln_ff_experts is told apart by each token's own"):
        opened(Pool(2), some(("atb_ln_ff_experts",)))


def test_reduce_hands_on_every_block_and_lists_what_comes_back():
    attr = some(queries=(5, 0, 2))
    blocks = []

    def fn(rows):
        blocks.append(rows)
        return None if rows.batch else (rows.layer, rows.queries.tolist())

    found = kept(Reduce(fn), attr, cut=2)
    assert (found.maps, found.largest) == ({}, {})
    assert found.reduced == [(layer, queries) for layer in (0, 2, 5) for queries in ([5, 0],)]
    assert [(rows.layer, rows.batch) for rows in blocks] == [(n, b) for n in (0, 2, 5) for b in (0, 1)]
    for rows in blocks:
        assert rows.keys.tolist() == attr.mask[rows.batch].nonzero()[:, 0].tolist()
        n = [attr.queries.index(query) for query in rows.queries.tolist()]
        for scope, maps in attr.maps.items():
            expected = maps[attr.layers.index(rows.layer), rows.batch][..., n, :][..., rows.keys]
            assert torch.equal(rows.maps[scope], expected)


def test_an_error_of_the_function_passes_through():
    def fn(rows):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        kept(Reduce(fn), some())


@pytest.mark.parametrize("asked", [Dense(), TopK(2), Pool(2), Reduce(lambda rows: rows.layer)])
def test_no_rows_at_all(asked):
    attr = some(queries=())
    sink = opened(asked, attr)
    none = torch.empty(0, dtype=torch.int64)
    sink.add_rows(0, 0, none, none, {scope: maps[0, 0][..., :0] for scope, maps in attr.maps.items()})
    found = sink.finish()
    assert found.reduced == []
    assert all(maps.shape[-2] == 0 for maps in found.maps.values())


@pytest.mark.parametrize("asked", [Dense(), TopK(2), Pool(2), Reduce(lambda rows: rows.keys.tolist())])
def test_no_keys_at_all(asked):
    attr = some()
    sink = opened(asked, attr)
    none = torch.empty(0, dtype=torch.int64)
    sink.add_rows(
        1, 0, torch.tensor([3, 5]), none, {scope: maps[1, 0][..., [3, 5], :0] for scope, maps in attr.maps.items()}
    )
    found = sink.finish()
    assert not any(maps.any() for maps in found.maps.values())
    assert not any(top.values.any() or top.rest.any() or (top.keys >= 0).any() for top in found.largest.values())
    assert found.reduced == ([[]] if isinstance(asked, Reduce) else [])


@pytest.mark.parametrize("asked", [Dense(), TopK(2), Pool(2)])
def test_a_scope_that_a_layer_lacks_stays_empty(asked):
    attr = some(("atb", "atb_ff"))
    sink = opened(asked, attr)
    sink.add_rows(0, 0, torch.tensor([1]), torch.arange(7), {"atb": attr.maps["atb"][0, 0, 1:2]})
    found = sink.finish()
    values = found.maps or {scope: top.values for scope, top in found.largest.items()}
    assert values["atb"].any()
    assert not values["atb_ff"].any()


@pytest.mark.parametrize("asked", [Dense(), Dense(torch.float16), TopK(2), Pool(2)])
@pytest.mark.parametrize("queries", [None, (5, 0, 2)])
def test_tiles_from_another_device(asked, queries):
    """The sink is on one device and the layer on another."""
    attr = some(queries=queries)
    expected = kept(asked, attr)
    with TwoDevices():
        found = kept(asked, attr, device=THERE)
    for scope in SCOPES:
        if expected.largest:
            for part in ("values", "keys", "rest", "total"):
                assert torch.equal(getattr(found.largest[scope], part), getattr(expected.largest[scope], part))
        else:
            assert torch.equal(found.maps[scope], expected.maps[scope])


def test_what_keep_may_be():
    assert keep.parse_keep("dense") == Dense() == ffattr.Dense(None, None)
    assert keep.parse_keep(TopK(3)) == TopK(3)
    for asked, error, message in (
        ("sparse", ValueError, r"unknown keep 'sparse', expected 'dense', or ffattr.Dense"),
        (None, TypeError, "keep is None, expected 'dense'"),
        (TopK, TypeError, "keep is <class"),
    ):
        with pytest.raises(error, match=message):
            keep.parse_keep(asked)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TopK(0), ValueError, r"TopK\(k=0\), expected at least 1"),
        (lambda: TopK(2.0), TypeError, r"TopK\(k=2.0\), expected an integer"),
        (lambda: Pool(-1), ValueError, r"Pool\(block=-1\)"),
        (lambda: Pool(True), TypeError, r"Pool\(block=True\)"),
        (lambda: Reduce(3), TypeError, r"Reduce\(3\), expected a function"),
        (lambda: Dense(torch.int32), ValueError, r"Dense\(dtype=torch.int32\)"),
        (lambda: Dense("float16"), ValueError, r"Dense\(dtype='float16'\)"),
        (lambda: Dense(path=3), TypeError, r"Dense\(path=3\)"),
    ],
)
def test_arguments_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- files


def _mapped(tensor, path):
    """Whether a tensor's numbers lie in a file that is mapped into memory."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= tensor.data_ptr() < end:
                return str(path) in line
    return False


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [7, 8])
def test_a_file_is_what_save_would_have_made(tmp_path, tokens, dtype):
    attr = some(tokens=tokens, queries=(5, 0, 2), real=((0, 1, 3, 4, 5, 6), (2, 3, 4), (6,)))
    attr.tokens[0][0] = "Ġthe 日本\n"
    attr.plan = "a plan " * 20_000  # longer than the header
    path = tmp_path / "maps.safetensors"
    found = kept(Dense(dtype, path), attr, cut=2)
    expected = kept(Dense(dtype), attr)
    assert [file.name for file in tmp_path.iterdir()] == ["maps.safetensors"]
    loaded = load(path)
    for other in (found, loaded):
        assert other.maps.keys() == expected.maps.keys()
        for scope, maps in expected.maps.items():
            assert torch.equal(other.maps[scope], maps)
            assert other.maps[scope].dtype == maps.dtype
            if sys.platform == "linux":
                assert _mapped(other.maps[scope], path)
    expected.save(tmp_path / "saved.safetensors")
    saved = load(tmp_path / "saved.safetensors")
    assert all(torch.equal(loaded.bias[scope], saved.bias[scope]) for scope in SCOPES)
    for name in ("tokens", "layers", "queries", "scopes", "plan", "arguments", "key_tokens", "block"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert torch.equal(loaded.mask, saved.mask)
    assert torch.equal(loaded.error, saved.error)
    tensors = load_file(path)  # any reader of safetensors
    assert torch.equal(tensors["maps.atb"], expected.maps["atb"])


def test_every_tensor_in_the_file_is_aligned(tmp_path):
    attr = some(("atb",), layers=(1,), tokens=3, real=((0, 1, 2),), queries=(0,))
    path = tmp_path / "a.safetensors"
    kept(Dense(torch.float16, path), attr)  # three numbers of two bytes
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0
    with safetensors.safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            tensor = file.get_tensor(name)
            assert tensor.data_ptr() % tensor.element_size() == 0, name


def test_results_may_be_changed_without_changing_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    attr = some(("atb",))
    found = kept(Dense(path=path), attr)
    found.maps["atb"] += 1
    loaded = load(path)
    assert torch.equal(loaded.maps["atb"], attr.maps["atb"])
    loaded.maps["atb"] += 1
    assert torch.equal(load(path).maps["atb"], attr.maps["atb"])


def test_saving_onto_the_file_that_the_maps_are_read_from(tmp_path):
    path = tmp_path / "a.safetensors"
    attr = some(("atb",))
    found = kept(Dense(path=path), attr)
    found.maps["atb"][0, 0, 0] = 9.0
    found.save(path)
    assert torch.equal(load(path).maps["atb"], found.maps["atb"])
    loaded = load(path)
    loaded.save(path)
    assert torch.equal(load(path).maps["atb"], found.maps["atb"])
    assert list(tmp_path.iterdir()) == [path]


def _open(path, attr):
    return opened(Dense(path=path), attr)


def test_an_unfinished_file_is_none(tmp_path):
    attr = some()
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    sink = feed(_open(path, attr), attr)
    (temporary,) = (file for file in tmp_path.iterdir() if file != path)
    assert temporary.suffix == ".safetensors"
    assert path.read_bytes() == b"old"
    with pytest.raises(FileFormatError, match="cut off or damaged"):
        load(temporary)
    sink.finish()
    with pytest.raises(FileFormatError, match="cut off or damaged"):
        load(temporary)
    sink.discard_file()
    assert list(tmp_path.iterdir()) == [path]
    sink.discard_file()


def test_discarding_a_finished_file_leaves_it(tmp_path):
    attr = some(("atb",))
    sink = feed(_open(tmp_path / "a.safetensors", attr), attr)
    result_of(sink, attr, sink.finish())
    sink.discard_file()
    assert load(tmp_path / "a.safetensors").scopes == ("atb",)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_file_that_cannot_be_finished_vanishes(tmp_path, monkeypatch, function):
    def fail(*_):
        raise OSError(errno.EIO, "broken")

    attr = some(("atb",))
    sink = feed(_open(tmp_path / "a.safetensors", attr), attr)
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="broken"):
        result_of(sink, attr, sink.finish())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_full_disk_is_an_error_before_the_work(tmp_path, monkeypatch):
    asked = []

    def full(descriptor, offset, length):
        asked.append((offset, length))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    attr = some(("atb",))
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(
        OSError, match=r"no room for 0\.\d\d GiB of maps \(No space left on device\).*a\.safetensors"
    ) as e:
        _open(path, attr)
    assert e.value.errno == errno.ENOSPC
    ((offset, length),) = asked
    assert offset == 0
    assert length > attr.maps["atb"].nbytes
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_room_is_taken_at_the_start_also_where_there_is_no_fallocate(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    attr = some(("atb",), tokens=200, real=(tuple(range(200)),))
    sink = _open(tmp_path / "a.safetensors", attr)
    (temporary,) = tmp_path.iterdir()
    assert temporary.stat().st_blocks * 512 >= attr.maps["atb"].nbytes
    feed(sink, attr, cut=200)
    result_of(sink, attr, sink.finish())
    assert torch.equal(load(tmp_path / "a.safetensors").maps["atb"], attr.maps["atb"])


def test_where_a_file_cannot_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        _open(tmp_path / "none" / "a.safetensors", some())
    with pytest.raises(IsADirectoryError):
        _open(tmp_path, some())


def test_the_folder_of_the_start_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attr = some(("atb",))
    sink = feed(_open("a.safetensors", attr), attr)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = result_of(sink, attr, sink.finish())
    assert torch.equal(found.maps["atb"], attr.maps["atb"])
    assert (tmp_path / "a.safetensors").is_file()


def test_more_scopes_than_the_header_has_room_for(tmp_path):
    attr = some(("atb",))
    sink = feed(_open(tmp_path / "a.safetensors", attr), attr)
    sink.finish()
    with pytest.raises(ValueError, match=r"1002 tensors do not fit the header of .*: ask for fewer scopes"):
        sink.seal_file({f"bias.{n}": torch.zeros(1) for n in range(1000)}, {})
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
from keeping import feed, opened, some
from ffattr import Dense
attr = some(("atb",))
sink = feed(opened(Dense(path=sys.argv[1]), attr), attr)
os._exit(7)
"""


def test_a_killed_run_leaves_nothing_that_loads(tmp_path):
    path = tmp_path / "a.safetensors"
    command = [sys.executable, "-c", KILLED, str(path)]
    result = subprocess.run(command, env=environment(), check=False)
    assert result.returncode == 7
    assert not path.exists()
    for left in tmp_path.iterdir():
        with pytest.raises(FileFormatError):
            load(left)


def test_an_older_file_is_read(tmp_path):
    """Of the first version of the format, without what came later."""
    attr = attribution(("atb",))
    tensors, content = to_parts(attr)
    del content["block"]
    files.write(tmp_path / "a.safetensors", tensors, content)
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["format_version"] == "1"
    assert load(tmp_path / "a.safetensors").block is None
