from dataclasses import replace

import documented
import pandas as pd
import pytest
import torch
from synthetic import POST_LN
from tiny_models import build, inputs

import ffattr
from ffattr.analysis import cancellation, contextualization_change, ff_energy, norm_balance
from ffattr.models.registry import resolve

COLUMNS = ["layer", "component", "before", "after", "order", "removed", "value", "low", "high"]


def decomposed(model, given, **asked):
    """Vectors of all scopes from ``atb`` on, and the maps of the same."""
    attr = ffattr.attribute(model, given, scopes="all", backend="reference", **asked)
    scopes = attr.scopes[attr.scopes.index("atb") :]
    return list(ffattr.vectors(model, given, scope=scopes, **asked).values()), attr


def rho(a, b):
    return pd.DataFrame({"a": a.numpy(), "b": b.numpy()}).rank().corr().loc["a", "b"]


def naive(vectors, order, k, causal):
    """Maps computed anew from vectors without the dimensions; ``order`` ``[L, d]``."""
    by_scope, rows = {one.scope: one for one in vectors}, {}
    one = vectors[0]
    for before in by_scope:
        for after in by_scope:
            for at, layer in enumerate(one.layers):
                kept = torch.tensor([c for c in range(one.values.shape[-1]) if c not in order[at, :k].tolist()])
                found = []
                for batch, mask in enumerate(one.mask):
                    pairs = [
                        (n, key)
                        for n, query in enumerate(one.queries)
                        for key in range(len(mask))
                        if mask[query] and mask[key] and not (causal and key > query)
                    ]
                    a, b = (
                        torch.stack([by_scope[s].values[at, batch, n, key, kept].norm() for n, key in pairs])
                        for s in (before, after)
                    )
                    found.append(1 - rho(a, b))
                rows[layer, before, after] = sum(found) / len(found)
    return rows


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", ["bert", "torch-pre", "gpt2", "llama"])
def test_with_nothing_removed_it_is_the_change_of_the_maps(name, padding):
    padding = padding if name != "torch-pre" else None
    vectors, attr = decomposed(build(name), inputs(name, padding=padding), queries=[5, 0, 6, 3])
    for order in ("ff", "random"):
        found = cancellation(vectors, [0], order=order)
        assert list(found) == COLUMNS
        expected = contextualization_change(attr)
        pd.testing.assert_frame_equal(found[list(expected)], expected, rtol=0, atol=1e-12)
    assert attr.arguments["causal"] is (name in ("gpt2", "llama"))


def test_the_model_of_the_examples():
    names = documented.namespace()
    texts = ["The cat sat on the mat.", "Dogs barking."]
    scopes = POST_LN[POST_LN.index("atb") :]
    vectors = ffattr.vectors(names["model"], texts, tokenizer=names["tokenizer"], scope=list(scopes))
    found = cancellation(vectors)
    pd.testing.assert_frame_equal(cancellation(list(vectors.values())), found)
    assert len(found) == 3 * 4 * 6
    first = found[found["removed"] == 0].reset_index(drop=True)
    expected = contextualization_change(names["attr"])
    pd.testing.assert_frame_equal(first[list(expected)], expected, rtol=0, atol=1e-6)
    assert not found[found["removed"] == 16]["value"].round(3).equals(first["value"].round(3))


@pytest.mark.parametrize("order", ["ff", "gamma"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_dimensions_left_out_of_every_norm(name, order):
    model = build(name)
    vectors, attr = decomposed(model, inputs(name, padding="right"), layers=[1, 0], queries=[6, 4, 1])
    if order == "ff":
        asked, scores = {}, ff_energy(vectors)
    else:
        norms = [spec.weights(None) for spec in resolve(model).layers]
        gamma = torch.stack([(w.norm_after_ff or w.norm_before_ff).weight for w in norms])[[1, 0]]
        asked = {"order": order, "scores": -gamma.abs()}
        scores = asked["scores"]
    found = cancellation(vectors, [7, 0, 3], **asked)
    assert found["removed"].tolist()[:3] == [7, 0, 3]
    assert set(found["order"]) == {order}
    ranks = scores.argsort(dim=-1, descending=True)
    for k in (0, 3, 7):
        expected = naive(vectors, ranks, k, attr.arguments["causal"])
        for row in found[found["removed"] == k].itertuples():
            assert row.value == pytest.approx(expected[row.layer, row.before, row.after], abs=1e-10)


def test_blocks_of_queries_change_nothing(monkeypatch):
    vectors, _ = decomposed(build("bert"), inputs("bert"))
    expected = cancellation(vectors, [0, 2, 39])
    monkeypatch.setitem(cancellation.__globals__, "_AT_ONCE", 3 * 7 * 40)  # three queries, then three, then one
    pd.testing.assert_frame_equal(cancellation(vectors, [0, 2, 39]), expected, rtol=0, atol=1e-15)


def test_random_is_a_control_with_a_seed():
    vectors, _ = decomposed(build("bert"), inputs("bert"))
    one, same, other = (cancellation(vectors, [5], order="random", seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(one, same)
    assert (one["value"] != other["value"]).all()
    alone = [replace(v, values=v.values[1:], layers=(1,), total=v.total[1:], bias=v.bias[1:]) for v in vectors]
    last = one[one["layer"] == 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(cancellation(alone, [5], order="random"), last)
    twice = [replace(v, values=v.values[[1, 1]], total=v.total[[1, 1]], bias=v.bias[[1, 1]]) for v in vectors]
    first, second = (rows["value"].to_numpy() for _, rows in cancellation(twice, [5], order="random").groupby("layer"))
    assert (first != second).all()  # of one layer under two numbers: other dimensions


def test_an_effect_that_lies_in_one_dimension_goes_with_it():
    """FF adds to one dimension, and the norm takes it back."""
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(1, 1, 6, 6, 8, generator=generator, dtype=torch.float64)
    after = before.clone()
    after[..., 3] += 50 * torch.rand(1, 1, 6, 6, generator=generator, dtype=torch.float64)
    normed = after * torch.tensor([1.0, 1, 1, 1e-3, 1, 1, 1, 1])
    mask, tokens = torch.ones(1, 6, dtype=torch.bool), [["a"] * 6]
    vectors = [
        ffattr.Vectors(values, torch.zeros(1, 1, 6, 8), values.sum(-2), tokens, (4,), tuple(range(6)), scope, mask)
        for scope, values in (("atb", before), ("atb_ff", after), ("atb_ff_res", after), ("atb_ff_res_ln", normed))
    ]
    found = cancellation(vectors, [0, 1]).pivot_table(index="component", columns="removed", values="value")
    assert (found.loc[["FF", "LN"], 0] > 0.5).all()
    assert (found[1].abs() < 1e-12).all()
    assert ff_energy(vectors).argmax() == 3
    scores = torch.zeros(8)
    scores[5] = 1
    other = cancellation(vectors, [1], order="another", scores=scores)
    assert (other[other["component"].isin(["FF", "LN"])]["value"] > 0.5).all()


def test_whether_later_keys_count():
    vectors, attr = decomposed(build("gpt2"), inputs("gpt2"))
    attr.arguments["causal"] = False
    expected = contextualization_change(attr)
    found = cancellation(vectors, [0], causal=False)
    pd.testing.assert_frame_equal(found[list(expected)], expected, rtol=0, atol=1e-12)
    assert (found["value"] < cancellation(vectors, [0])["value"]).all()  # the zeros agree


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_energy_is_that_of_the_networks_output(name):
    model, given = build(name), inputs(name, padding="right")
    outputs = []
    modules = [m for m in model.modules() if type(m).__name__ in ("BertOutput", "GPT2MLP")]
    hooks = [
        (m.dense if name == "bert" else m).register_forward_hook(lambda m, a, out: outputs.append(out)) for m in modules
    ]
    with torch.no_grad():
        model(**given)
    for hook in hooks:
        hook.remove()
    vectors, _ = decomposed(model, given)
    real = given["attention_mask"].bool()
    for layer, output in enumerate(outputs):
        torch.testing.assert_close(ff_energy(vectors)[layer], output[real].square().mean(0))
    balance = norm_balance(vectors)
    assert list(balance) == ["layer", "ff", "bypass", "ratio"]
    atb = next(v for v in vectors if v.scope == "atb").total
    for layer, output in enumerate(outputs):
        ff, bypass = output[real].norm(dim=-1), atb[layer][real].norm(dim=-1)
        expected = [layer, ff.mean().item(), bypass.mean().item(), (ff.mean() / bypass.mean()).item()]
        assert balance.loc[layer].tolist() == pytest.approx(expected, rel=1e-9)


def test_what_does_not_belong_together():
    model, given = build("bert"), inputs("bert")
    atb, ff = (ffattr.vectors(model, given, scope=scope) for scope in ("atb", "atb_ff"))
    with pytest.raises(ValueError, match=r"no vectors: expected those of scopes that follow each other"):
        cancellation([])
    with pytest.raises(ValueError, match=r"no two neighbouring scopes of the feed-forward block among atb"):
        cancellation([atb])
    with pytest.raises(ValueError, match=r"no vectors of the feed-forward network .* among atb"):
        ff_energy([atb])
    with pytest.raises(ValueError, match=r"no vectors of atb_ff_res among those of atb, atb_ff"):
        norm_balance([atb, ff])
    for asked in ({"layers": 0}, {"layers": [1, 0]}, {"queries": [6, 5, 4, 3, 2, 1, 0]}):
        other = ffattr.vectors(model, given, scope="atb_ff", **asked)
        with pytest.raises(ValueError, match=r"vectors of atb and atb_ff are not of the same inputs, layers"):
            cancellation([atb, other])
    other = ffattr.vectors(model, inputs("bert", padding="right"), scope="atb_ff")
    with pytest.raises(ValueError, match=r"not of the same inputs"):
        cancellation([atb, other])
    with pytest.raises(ValueError, match=r"attn_heads are told apart by head"):
        cancellation([atb, ffattr.vectors(model, given, scope="attn_heads")])


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"removed": []}, r"removed is empty"),
        ({"removed": [0, 40]}, r"removed has 40, expected integers from 0 to 39"),
        ({"removed": [-1]}, r"removed has -1"),
        ({"removed": [1.5]}, r"removed has 1\.5"),
        ({"order": "gamma"}, r"order='gamma', expected 'ff', 'random', or a name of your own together with scores"),
        ({"order": "gamma", "scores": torch.rand(3, 40)}, r"scores have shape \[3, 40\], expected \[2, 40\]"),
    ],
)
def test_arguments_that_are_wrong(asked, match):
    vectors, _ = decomposed(build("bert"), inputs("bert"))
    with pytest.raises(ValueError, match=match):
        cancellation(vectors, **asked)
