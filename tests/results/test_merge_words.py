"""Maps of words made of maps of tokens."""

import documented
import pytest
import torch
from keeping import kept
from synthetic import HEADS, attribution

import ffattr
from ffattr import Pool, StackedAttribution, TopK

TOKENS = [["[CLS]", "dog", "##s", "bark", "##ing", "[SEP]"], ["cat", "##s", "##es", ".", "[PAD]", "[PAD]"]]
WORDS = [["[CLS]", "dogs", "barking", "[SEP]"], ["catses", ".", "", ""]]
MEMBERS = [[[0], [1, 2], [3, 4], [5]], [[0, 1, 2], [3]]]
REDUCE = {
    "sum": lambda x: x.sum(),
    "max": lambda x: x.max(),
    "mean": lambda x: x.mean(),
    "first": lambda x: x[0],
    "last": lambda x: x[-1],
}


def made(scopes=("attn_heads", "atb"), **options):
    attr = attribution(scopes, **options)
    attr.tokens = TOKENS
    return attr


@pytest.mark.parametrize("keys", ["sum", "max"])
@pytest.mark.parametrize("queries", ["mean", "max", "first", "last"])
def test_rows_and_columns_of_words(keys, queries):
    attr = made()
    found = attr.to_words(keys=keys, queries=queries)
    assert found.tokens == WORDS
    assert found.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert found.queries == (0, 1, 2, 3)
    assert found["atb"].shape == (3, 2, 4, 4)
    assert found["attn_heads"].shape == (3, 2, HEADS, 4, 4)
    for batch, members in enumerate(MEMBERS):
        for i, rows in enumerate(members):
            assert found.bias["atb"][2, batch, i] == pytest.approx(REDUCE[queries](attr.bias["atb"][2, batch, rows]))
            for j, columns in enumerate(members):
                block = attr.maps["attn_heads"][1, batch, 1][rows][:, columns]
                expected = REDUCE[queries](torch.stack([REDUCE[keys](row) for row in block]))
                assert found["attn_heads"][1, batch, 1, i, j] == pytest.approx(float(expected), rel=1e-5)
        words = len(members)
        assert not found["atb"][:, batch, words:].any()
        assert not found["atb"][:, batch, :, words:].any()


def test_what_is_made_of_words_has_all_views(tmp_path):
    found = made().to_words()
    assert set(found.top(2, "atb")["query_token"]) <= {"[CLS]", "dogs", "barking", "[SEP]", "catses", "."}
    found.save(tmp_path / "words.safetensors")
    assert ffattr.load(tmp_path / "words.safetensors").tokens == WORDS


def test_words_that_are_given():
    attr = made()
    attr.tokens = [list("abcdef")] * 2
    given = [[None, 0, 0, 1, 1, None], [0, 0, 0, 1, None, None]]
    found = attr.to_words(words=given)
    assert found.tokens == [["a", "bc", "de", "f"], ["abc", "d", "", ""]]
    assert torch.equal(found["atb"], made().to_words()["atb"])
    with pytest.raises(ValueError, match=r"words\[0\] has 2 entries, expected one for each of 6 tokens"):
        attr.to_words(words=[[0, 1]] * 2)
    with pytest.raises(ValueError, match="words has 1 lists, expected one for each of the 2 sequences"):
        attr.to_words(words=given[:1])


def test_columns_that_are_words_already():
    """The sum of norms of a word's tokens is no less than the norm of their sum."""
    given = documented.namespace()
    texts = ["the cat barking.", "dogs sat."]
    options = {"tokenizer": given["tokenizer"], "scopes": ["atb", "layer"]}
    exact = ffattr.attribute(given["model"], texts, groups="words", **options).to_words()
    bound = ffattr.attribute(given["model"], texts, **options).to_words()
    assert (
        exact.tokens == bound.tokens == exact.key_tokens == [["[CLS]", "the", "cat", "barking", ".", "[SEP]"], WORDS2]
    )
    assert exact.groups.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, -1]]  # a word's own column
    pairs = exact.top(100, "atb")
    assert (pairs["query_token"] != pairs["key_token"]).all()
    for scope in exact.scopes:
        assert (exact[scope] <= bound[scope] + 1e-9).all()
        alone = [0, 1, 2, 4, 5]
        assert torch.allclose(exact[scope][:, 0][..., alone], bound[scope][:, 0][..., alone])
        assert exact[scope][0, 0, 3, 3] < bound[scope][0, 0, 3, 3]


WORDS2 = ["[CLS]", "dogs", "sat", ".", "[SEP]", ""]


def test_words_of_an_encoder_and_a_decoder():
    decoder, cross = made(("atb",)), made(("atb",), real=(6, 6), seed=3)
    cross.key_tokens, cross.key_mask = [["x", "##y", "z", "##a", "##b", "##c"]] * 2, torch.ones(2, 6).bool()
    cross.mask = decoder.mask
    found = StackedAttribution.of({"decoder": decoder, "cross": cross}).to_words()
    assert found["decoder.atb"].shape == (3, 2, 4, 4)
    assert found["cross.atb"].shape == (3, 2, 4, 2)
    assert found.stacks["cross"].key_tokens == [["xy", "zabc"]] * 2
    expected = cross.maps["atb"][0, 0, 1:3, 2:].sum(1).mean()
    assert found["cross.atb"][0, 0, 1, 1] == pytest.approx(float(expected))
    with pytest.raises(ValueError, match="words= is for one stack"):
        StackedAttribution.of({"decoder": decoder}).to_words(words=[[0]])


@pytest.mark.parametrize(
    ("attr", "options", "message"),
    [
        (made(), {"keys": "mean"}, "keys='mean', expected one of sum, max"),
        (made(), {"queries": "sum"}, "queries='sum', expected one of mean, max, first, last"),
        (made(queries=(0, 1)), {}, "only 2 of 6 queries were computed"),
        (kept(Pool(2), made(("atb",))), {}, "keep=Pool"),
        (kept(TopK(2), made(("atb",))), {}, "keep=TopK"),
    ],
)
def test_maps_that_have_no_words(attr, options, message):
    with pytest.raises(ValueError, match=message):
        attr.to_words(**options)
