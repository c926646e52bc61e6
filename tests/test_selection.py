"""Which layers, tokens, scopes and sequences a user asks for."""

import numpy as np
import pytest

from ffattr.selection import describe_scope, indices, integer, layer_place, list_names, scope_named, sequence


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, (0, 1, 2, 3)),
        (2, (2,)),
        (-1, (3,)),
        ([3, 0, -4, 3], (3, 0, 0, 3)),
        ((), ()),
        (range(1, 4, 2), (1, 3)),
        (slice(1, None), (1, 2, 3)),
        (slice(None, None, -2), (3, 1)),
        (slice(2, 99), (2, 3)),  # as slices of lists are cut
    ],
)
def test_indices_count_from_the_start_in_the_order_asked_for(asked, expected):
    assert indices("layers", asked, 4) == expected


def test_of_nothing_all_is_nothing():
    assert indices("queries", None, 0) == ()
    assert indices("queries", slice(None), 0) == ()
    with pytest.raises(IndexError, match="queries has 0, but there are 0"):
        indices("queries", 0, 0)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (4, IndexError, "layers has 4, but there are 4: expected -4 to 3"),
        ([0, -5], IndexError, "layers has -5, but there are 4: expected -4 to 3"),
        ("0", TypeError, "layers is '0', expected an integer, a sequence of integers, a slice or None"),
        (1.0, TypeError, "layers is 1.0, expected an integer"),
        ({1}, TypeError, r"layers is \{1\}, expected an integer"),
        ([1, "2"], TypeError, "layers has '2', expected integers, a slice or None"),
        (True, TypeError, "layers has True, expected integers"),
        ([None], TypeError, "layers has None, expected integers"),
    ],
)
def test_what_is_no_index_is_named(asked, error, message):
    with pytest.raises(error, match=message):
        indices("layers", asked, 4)


@pytest.mark.parametrize(("layer", "place"), [(5, 0), (0, 1), (2, 2), (-1, 2), (-3, 0)])
def test_a_layer_is_found_by_its_number_or_from_the_end(layer, place):
    assert layer_place(layer, (5, 0, 2)) == place


@pytest.mark.parametrize("layer", [1, 3, -4])
def test_a_layer_that_was_not_computed_is_said_with_those_that_were(layer):
    with pytest.raises(IndexError, match=f"layer {layer} was not computed; computed: 5, 0, 2$"):
        layer_place(layer, (5, 0, 2))


def test_sequences_count_from_the_end_too():
    assert [sequence(batch, 3) for batch in (0, 2, -1, -3)] == [0, 2, 2, 0]
    for batch, count in ((3, 3), (-4, 3), (0, 0)):
        with pytest.raises(IndexError, match=f"batch {batch} is out of range: there are {count} sequences"):
            sequence(batch, count)


def test_layer_names_the_last_scope():
    assert scope_named("layer", ("attn", "atb")) == "atb"
    assert scope_named("attn", ("attn", "atb")) == "attn"
    with pytest.raises(KeyError, match=r"no scope 'at' here; computed: attn, atb \(and the alias 'layer'\)"):
        scope_named("at", ("attn", "atb"))
    with pytest.raises(KeyError, match="no scope 'layer' here"):
        scope_named("layer", ())


@pytest.mark.parametrize("value", ["x", None, 1.0, [1]])
def test_what_is_no_number_is_refused_by_its_name(value):
    for place in (lambda: layer_place(value, (0, 1)), lambda: sequence(value, 2), lambda: integer("query", value)):
        with pytest.raises(TypeError, match=r"(layer|batch|query) is .*, expected an integer"):
            place()
    assert layer_place(np.int64(1), (0, 1)) == 1


def test_names_are_one_or_several():
    assert list_names("scopes", "atb") == ["atb"]
    assert list_names("scopes", ("atb", "layer")) == ["atb", "layer"]
    for value in (5, None, b"atb", {"atb"}):
        with pytest.raises(TypeError, match=r"scopes is .*, expected a name or a sequence of names"):
            list_names("scopes", value)


@pytest.mark.parametrize(
    ("scope", "words"),
    [
        ("attn_heads", "attention, by head"),
        ("attn_res", "attention + residual"),
        ("atb", "attention block"),
        ("atb_ln_ff_res", "attention block + norm + FF + residual"),
        ("atb_ff_res_ln", "attention block + FF + residual + norm"),
        ("atb_ln_ff_experts", "attention block + norm + FF, by expert"),
        ("cross.atb_ff", "attention block + FF, of the encoder's tokens"),
        ("decoder.atb", "decoder: attention block"),
        ("Paris", "Paris"),
        ("atb_more", "atb_more"),
    ],
)
def test_scopes_in_words(scope, words):
    assert describe_scope(scope) == words
