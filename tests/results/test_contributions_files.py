"""Contributions in files, with whatever was kept of flow."""

import pytest
import tiny_models
import torch
from made_contributions import contributions
from made_tokenizers import make_tokenizer

import ffattr
from ffattr import Dense, Pool, Reduce, TopK
from ffattr.errors import FileFormatError
from ffattr.results.files import read, write

TEXTS = ["the cat sat on a mat", "the dog ran"]


def same(found, c):
    assert repr(found) == repr(c)
    for name in ("value", "scores", "bias", "error", "mask", "positions", "residual", "cross_scores", "cross_mask"):
        mine, theirs = getattr(found, name), getattr(c, name)
        assert (mine is None) == (theirs is None), name
        assert mine is None or torch.equal(mine, theirs), name
    for name in ("targets", "tokens", "cross_tokens", "layers", "scope"):
        assert getattr(found, name) == getattr(c, name), name


@pytest.mark.parametrize("flow", [False, True, "heads"])
@pytest.mark.parametrize("encoder", [False, True])
def test_what_was_saved_comes_back(tmp_path, flow, encoder):
    c = contributions(flow=flow, encoder=encoder)
    c.save(tmp_path / "a.safetensors")
    found = ffattr.load(tmp_path / "a.safetensors")
    same(found, c)
    assert isinstance(found, ffattr.Contributions)
    for name in ("flow", "cross_flow"):
        mine, theirs = getattr(found, name), getattr(c, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)
    if encoder:
        same(found.encoder, c.encoder)
        assert not flow or torch.equal(found.encoder.flow, c.encoder.flow)


@pytest.fixture(scope="module")
def model():
    return tiny_models.build("gpt2", head="LMHeadModel")


@pytest.mark.parametrize("flow", [True, "heads"])
def test_flow_comes_back_however_it_was_kept(tmp_path, model, flow):
    tokenizer = make_tokenizer(pad_token="[PAD]")
    options = {"target": [4, (5, 7)], "tokenizer": tokenizer, "flow": flow}
    whole = ffattr.contributions(model, TEXTS, **options)
    for keep in (TopK(2), Pool(2), Dense(path=tmp_path / "dense.safetensors"), Reduce(lambda rows: rows.place)):
        c = ffattr.contributions(model, TEXTS, keep=keep, **options)
        c.save(tmp_path / "a.safetensors")
        found = ffattr.load(tmp_path / "a.safetensors")
        if isinstance(keep, Reduce):
            assert found.kept is None
            assert sorted(set(c.kept.reduced)) == list(range(2 * len(c.layers)))
            continue
        same(found, c)
        maps = whole.flow.flatten(0, 1)
        if isinstance(keep, Dense):
            torch.testing.assert_close(ffattr.load(tmp_path / "dense.safetensors").flow, whole.flow)
        elif isinstance(keep, TopK):
            top = found.kept.largest["flow"]
            order = maps.abs().sort(-1, descending=True).values[..., :2]
            torch.testing.assert_close(top.values.abs(), order)
            torch.testing.assert_close(maps.gather(-1, top.keys.clamp_min(0).long()) * (top.keys >= 0), top.values)
            assert bool((top.values < 0).any())
            torch.testing.assert_close(top.total, maps.sum(-1))
        else:
            rows = whole.mask.unflatten(1, (-1, 2)).sum(-1).double()
            pairs = (rows[:, :, None] * rows[:, None]).clamp_min(1)
            sums = found.kept.maps["flow"] * (pairs if flow is True else pairs[:, None])
            torch.testing.assert_close(sums.sum((-1, -2)), maps.sum((-1, -2)))


def test_a_file_that_is_garbled_says_so(tmp_path):
    contributions().save(tmp_path / "a.safetensors")
    tensors, content = read(tmp_path / "a.safetensors")
    write(tmp_path / "b.safetensors", {n: t for n, t in tensors.items() if n != "bias"}, content)
    with pytest.raises(FileFormatError, match="lacks or garbles 'bias'"):
        ffattr.load(tmp_path / "b.safetensors")
    write(tmp_path / "c.safetensors", tensors, {**content, "layers": [0]})
    with pytest.raises(FileFormatError, match=r"scores has shape \[2, 4, 2, 6\], expected \[2, 2, 2, 6\]"):
        ffattr.load(tmp_path / "c.safetensors")
