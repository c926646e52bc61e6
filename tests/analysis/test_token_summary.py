import math

import documented
import pandas as pd
import pytest
import torch
from keeping import kept, some
from synthetic import PRE_LN, attribution

import ffattr
from ffattr import Pool, Reduce, StackedAttribution, TopK
from ffattr.analysis import TokenSummary, token_summary

MAPS = {
    "padded": some(("attn", "atb"), queries=(6, 2, 0)),
    "causal": some(PRE_LN, causal=True, queries=(6, 3, 4, 0)),
    "float32": attribution(("atb", "atb_ff")),
}
maps = pytest.mark.parametrize("attr", MAPS.values(), ids=MAPS)


def expected(attr, scope):
    rows = []
    for place, layer in enumerate(attr.layers):
        for batch, mask in enumerate(attr.mask.tolist()):
            found = dict(zip(attr.queries, attr.maps[scope][place, batch].tolist(), strict=True))
            found = {query: row for query, row in found.items() if mask[query]}
            shares = {query: [value / (sum(row) or 1) for value in row] for query, row in found.items()}
            for token in (at for at, real in enumerate(mask) if real):
                own = shares[token][token] if token in found else math.nan
                takes = sum(shares[token]) - own if token in found else math.nan
                others = [q for q in found if q != token and not (attr.arguments["causal"] and q < token)]
                gives = sum(shares[query][token] for query in others)
                mean = gives / len(others) if others else math.nan
                norm = sum(found[token]) if token in found else math.nan
                rows.append((layer, batch, token, attr.tokens[batch][token], norm, own, takes, gives, mean))
    columns = ["layer", "batch", "position", "token", "norm", "own", "takes", "gives", "gives_mean"]
    return pd.DataFrame(rows, columns=columns)


@maps
@pytest.mark.parametrize("scope", ["layer", "atb"])
def test_a_summary_is_sums_of_shares(attr, scope):
    name = attr.scopes[-1] if scope == "layer" else scope
    pd.testing.assert_frame_equal(token_summary(attr, scope), expected(attr, name), rtol=1e-12, atol=1e-12)


@maps
@pytest.mark.parametrize("how", [{"cut": 1}, {"cut": 2}, {"cut": 3, "backwards": True}])
def test_a_stream_gives_the_same_summary(attr, how, monkeypatch):
    for at_once in (2**20, 10):
        monkeypatch.setattr("ffattr.analysis.rows.AT_ONCE", at_once)
        collector = TokenSummary()
        result = kept(Reduce(collector), attr, **how)
        assert result.reduced == []
        pd.testing.assert_frame_equal(collector.frame(result), token_summary(attr), rtol=1e-13, atol=1e-13)


def test_a_row_of_zeros_takes_nothing():
    attr = attribution(("atb",), layers=(0,), tokens=3, real=(3,))
    attr.maps["atb"][0, 0, 1] = 0
    row = token_summary(attr).iloc[1]
    assert (row["norm"], row["own"], row["takes"]) == (0, 0, 0)
    attr.maps["atb"][0, 0, 0] = torch.tensor([1.0, 3.0, 0.0])
    attr.maps["atb"][0, 0, 2] = torch.tensor([0.0, 1.0, 1.0])
    row = token_summary(attr).iloc[1]
    assert (row["gives"], row["gives_mean"]) == (1.25, 0.625)


def test_what_is_refused():
    attr = some(("attn_heads", "atb"))
    with pytest.raises(KeyError, match="no scope 'atb_ff' here; computed: attn_heads, atb"):
        token_summary(attr, "atb_ff")
    with pytest.raises(KeyError, match="no scope 'atb_ff' here"):
        kept(Reduce(TokenSummary("atb_ff")), attr)
    with pytest.raises(ValueError, match="the maps of attn_heads are told apart by head or expert"):
        token_summary(attr, "attn_heads")
    with pytest.raises(ValueError, match="the maps of attn_heads are told apart by head or expert"):
        kept(Reduce(TokenSummary("attn_heads")), attr)
    with pytest.raises(ValueError, match=r"no rows came yet: .*Reduce\(summary\)"):
        TokenSummary().frame(attr)
    with pytest.raises(TypeError, match=r"several stacks .* attr.stacks\['decoder'\]"):
        token_summary(StackedAttribution.of({"decoder": attr}))
    for keep in (TopK(2), Pool(2), Reduce(lambda rows: None)):
        with pytest.raises(ValueError, match=r"no whole maps of atb were kept: .*dense.*TokenSummary"):
            token_summary(kept(keep, some(("atb",))))
    collector = TokenSummary()
    kept(Reduce(collector), attr)
    for mistaken in (attribution(("atb",), layers=(0, 2)), attribution(("atb",), tokens=6), attribution(real=(6,))):
        with pytest.raises(ValueError, match=r"collected of the layers \[0, 2, 5\] and of at least 2 sequences of 7"):
            collector.frame(mistaken)
    with pytest.raises(ValueError, match="layer 0 of sequence 0 came twice: use a new TokenSummary"):
        kept(Reduce(collector), attr)
    attr.key_mask = attr.mask
    with pytest.raises(ValueError, match="the columns of these maps are not the tokens of their rows"):
        token_summary(attr)


def test_a_model_from_text_to_summary():
    """A stream of a real forward pass says what its kept maps say."""
    with_maps, model, words = (documented.namespace()[name] for name in ("attr", "model", "tokenizer"))
    collector, texts = TokenSummary(), ["The cat sat on the mat.", "Dogs barking."]
    attr = ffattr.attribute(model, texts, tokenizer=words, keep=Reduce(collector))
    found = collector.frame(attr)
    pd.testing.assert_frame_equal(found, token_summary(with_maps), rtol=1e-6)
    assert len(found) == 3 * (9 + 7)
    # What all tokens take of each other, all of them give.
    sums = found.groupby(["layer", "batch"])[["takes", "gives"]].sum()
    assert sums["takes"].to_numpy() == pytest.approx(sums["gives"].to_numpy())
