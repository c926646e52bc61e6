"""What is measured of a batch is what the analyses say of each document on its own."""

import pytest
import torch
from tiny_models import build

import ffattr
from ffattr.analysis import amplified_pairs, contextualization_change, pair_categories, token_summary
from ffattr.corpus.measure import Measure
from ffattr.corpus.pieces import Piece
from ffattr.errors import UnsupportedModel

pytestmark = pytest.mark.usefixtures("one_thread")
TABLES = ("documents", "pairs", "tokens", "top:3", "maps")


def measured(loaded, texts, keep=TABLES, scopes=("layer",), layers=None, pairs=4):
    model, tokenizer = loaded
    measure = Measure(model, tokenizer, keep, scopes, layers, pairs, None, "##")
    pieces = [Piece(3 * row, 0, list(tokenizer(text)["input_ids"]), row) for row, text in enumerate(texts)]
    return measure, pieces, measure.compute(pieces)


def test_of_each_document_on_its_own(loaded):
    texts = ["the cat sat on the mat", "two dogs barking", "sat"]
    measure, pieces, parts = measured(loaded, texts)
    for piece, numbers in zip(pieces, parts.pieces, strict=True):
        attr = ffattr.attribute(loaded[0], [piece.ids], tokenizer=loaded[1], scopes="all")
        assert (numbers.row, numbers.tokens) == (piece.row, len(piece.ids))
        change = contextualization_change(attr).set_index(["component", "layer"])["value"]
        for component, values in numbers.changes.items():
            assert values == pytest.approx(change[component].to_numpy(), abs=1e-4)
        categories = pair_categories(attr.tokens[0])
        assert numbers.all_pairs == len(piece.ids) * (len(piece.ids) - 1)
        assert numbers.counts == {name: int(found.sum()) for name, found in categories.items()}
        assert numbers.model_error < 1e-5
        pairs, own = parts.frames["pairs"].query("row == @piece.row"), amplified_pairs(attr, 4)
        assert pairs["amplification"].to_numpy() == pytest.approx(own["amplification"].to_numpy(), abs=1e-6)
        assert pairs[["layer", "rank"]].values.tolist() == own[["layer", "rank"]].values.tolist()
        tokens, sums = parts.frames["tokens"].query("row == @piece.row"), token_summary(attr)
        assert tokens["token"].tolist() == sums["token"].tolist()
        for name in ("norm", "own", "gives"):
            assert tokens[name].to_numpy() == pytest.approx(sums[name].to_numpy(), rel=1e-4)
        maps = parts.maps[f"{piece.row}.0.atb_ff_res_ln"]
        assert torch.allclose(maps, attr["layer"][:, 0], rtol=1e-4)
        top = parts.frames["top"].query("row == @piece.row")
        assert len(top) == 2 * len(piece.ids)
        for row in top.itertuples():
            of_map = maps[row.layer, row.position]
            assert row.values.tolist() == pytest.approx(of_map.sort(descending=True).values[:3].tolist())
            assert row.keys.tolist() == of_map.argsort(descending=True)[:3].tolist()
            assert row.total == pytest.approx(float(of_map.sum()), rel=1e-5)
    assert measure.scopes == ["atb", "atb_ff", "atb_ff_res", "atb_ff_res_ln"]


def test_layers_scopes_and_tables_are_those_asked_for(loaded):
    measure, _, parts = measured(loaded, ["the cat"], ("tokens",), ("atb", "layer"), [-1])
    assert list(parts.frames) == ["tokens"]
    assert parts.maps == {}
    assert set(parts.frames["tokens"]["scope"]) == {"atb", "atb_ff_res_ln"}
    assert set(parts.frames["tokens"]["layer"]) == {1}
    assert measure.layout.layers == (1,)
    assert {len(values) for values in parts.pieces[0].changes.values()} == {1}


def test_scores_add_up_to_the_models_own_number(loaded):
    """Of a classifier's class; the rows of a document with what comes from no token."""
    model = build("bert", head="ForSequenceClassification", num_hidden_layers=2, dtype=torch.float32)
    measure = Measure(model, loaded[1], ("documents", "scores"), ("layer",), None, 4, None, "##", target="1")
    pieces = [Piece(4, 0, [2, 4, 5, 3], 0), Piece(7, 1, [2, 6, 3], 0)]
    frame = measure.compute(pieces).frames["scores"]
    assert frame["token"].tolist()[:5] == ["[CLS]", "the", "cat", "[SEP]", "(bias)"]
    for piece in pieces:
        logits = model(torch.tensor([piece.ids])).logits[0]
        mine = frame[(frame["row"] == piece.row) & (frame["window"] == piece.window)]
        assert mine["position"].tolist() == [*range(len(piece.ids)), -1]
        assert mine["score"].sum() == pytest.approx(logits[1].item(), abs=1e-5)
    assert measure.layout.schemas["scores"].names[3:] == ["target", "position", "token", "score"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": ("documents", "top")}, ValueError, "unknown table 'top', expected some of documents, pairs, tokens"),
        ({"keep": ("top:0",)}, ValueError, "unknown table 'top:0'"),
        ({"scopes": ("attn_heads",)}, ValueError, "the maps of attn_heads are told apart by head"),
        ({"scopes": ("none",)}, ValueError, "unknown scope 'none'"),
        ({"layers": [0, 0]}, ValueError, r"layers are \[0, 0\], expected one or more, each once"),
        ({"layers": [7]}, IndexError, "layers has 7, but there are 2"),
    ],
)
def test_what_cannot_be_measured(loaded, options, error, message):
    with pytest.raises(error, match=message):
        measured(loaded, ["the cat"], **options)


def test_a_parallel_block_has_no_pairs_and_a_model_of_two_stacks_is_refused(loaded):
    _, _, parts = measured((build("phi"), loaded[1]), ["the cat sat"])
    assert len(parts.frames["pairs"]) == 0
    assert len(parts.frames["tokens"]) > 0
    from ffattr.corpus import Mapper

    with pytest.raises(UnsupportedModel, match="an encoder and a decoder"):
        Mapper(build("bart"), loaded[1])
