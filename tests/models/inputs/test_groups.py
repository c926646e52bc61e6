"""Which columns maps have where keys are selected or grouped."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from made_tokenizers import SPECIAL, fast, wordpiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BatchEncoding
from two_devices import THERE, TwoDevices, place, put

from ffattr import attribute, vectors
from ffattr.models.inputs import groups
from ffattr.models.inputs.groups import Groups
from ffattr.models.inputs.prepare import prepare_inputs
from ffattr.models.registry import resolve

MASK = torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
TOKENS = [["a", "b", "c", "d", "e"], ["[PAD]", "[PAD]", "x", "y", "z"]]


def of(asked: Any = None, keys: Any = None, inputs: Any = None, tokenizer: Any = None) -> Groups:
    found = groups.make_groups(asked, keys, inputs, tokenizer, MASK, TOKENS)
    assert found is not None
    assert found.index.dtype == torch.int64
    return found


def metaspace(split: bool) -> Any:
    """As that of T5, which splits text into words, or of Llama, which does not."""
    pieces = [*SPECIAL, "▁", "▁the", "▁cat", "s", "▁▁", "▁sat", "x", "<0x0A>", "the", "▁x▁"]
    scores = [0.0, -9.0, 0.0, 0.0, -4.0, -1.0, -1.0, -1.0, -3.0, -1.0, -2.0, -2.0, -2.0, -0.5]
    vocabulary = list(zip(pieces, scores, strict=True))
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=1, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    tokenizer.decoder = decoders.Metaspace()
    return fast(tokenizer)


def byte_level() -> Any:
    pieces = [*SPECIAL, "c", "a", "t", "s", "Ġ", "ca", "cat", "Ġcat", "Ċ"]
    merges = [("c", "a"), ("ca", "t"), ("Ġ", "cat")]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\s+(?!\S)|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return fast(tokenizer)


def words(inputs: Any, tokenizer: Any) -> Groups:
    model = tiny_models.build("bert")
    prepared = prepare_inputs(resolve(model), model, inputs, tokenizer)
    found = groups.make_groups("words", None, inputs, tokenizer, prepared.mask, prepared.tokens)
    assert found is not None
    return found


def test_nothing_asked_for() -> None:
    assert groups.make_groups(None, None, None, None, MASK, TOKENS) is None


def test_keys() -> None:
    found = of(keys=[3, 0, -1])
    assert found.index.tolist() == [[1, -1, -1, 0, 2], [-1, -1, -1, 0, 2]]
    assert found.texts == [["d", "a", "e"], ["y", "", "z"]]
    assert found.mask.tolist() == [[True] * 3, [True, False, True]]
    assert of(keys=1).index.tolist() == [[-1, 0, -1, -1, -1], [-1] * 5]
    assert of(keys=1).mask.tolist() == [[True], [False]]
    assert of(keys=slice(3, None)).texts == [["d", "e"], ["y", "z"]]


def test_keys_that_end_with_padding_keep_their_columns() -> None:
    mask = torch.tensor([[True, True, False, False]])
    found = groups.make_groups(None, [0, 3], None, None, mask, [["a", "b", "p", "p"]])
    assert found is not None
    assert found.mask.tolist() == [[True, False]]
    assert found.texts == [["a", ""]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_numbers(dtype: torch.dtype) -> None:
    given = torch.tensor([[1, 0, 1, 2, 2], [7, 7, 2, 0, 2]], dtype=dtype)
    found = of(given)
    assert found.index.tolist() == [[1, 0, 1, 2, 2], [-1, -1, 2, 0, 2]]
    assert found.texts == [["b", "a c", "d e"], ["y", "", "x z"]]
    assert found.mask.tolist() == [[True] * 3, [True, False, True]]
    assert given[1, 0] == 7  # the user's own tensor


def test_spans() -> None:
    found = of([[(0, 2), [4, 5]], [(0, 4)]])
    assert found.index.tolist() == [[0, 0, -1, -1, 1], [-1, -1, 0, 0, -1]]
    assert found.texts == [["a b", "e"], ["x y", ""]]
    assert found.mask.tolist() == [[True, True], [True, False]]
    assert of(([(3, 5), (0, 3)], [])).index.tolist() == [[1, 1, 1, 0, 0], [-1] * 5]


def test_spans_may_be_whole_sequences() -> None:
    assert of([[(0, 5)], [(0, 5)]]).index.tolist() == [[0] * 5, [-1, -1, 0, 0, 0]]


def test_columns_are_where_the_mask_is() -> None:
    here = torch.tensor([[1, 0, 1, 2, 2], [-1, -1, 2, 0, 2]])
    with TwoDevices():
        mask = put(MASK.clone(), THERE)
        for asked, keys in ((here, None), ([[(0, 2)], []], None), (None, [0, 3])):
            found = groups.make_groups(asked, keys, None, None, mask, TOKENS)
            assert found is not None
            assert place(found.index) == place(found.mask) == THERE
        tokenizer = wordpiece()
        encoded = tokenizer(["the cats"], return_tensors="pt")
        tokens = [encoded.tokens()]
        found = groups.make_groups(
            "words", None, encoded, tokenizer, put(torch.ones(1, 5, dtype=torch.bool), THERE), tokens
        )
        assert found is not None
        assert place(found.index) == place(found.mask) == THERE


def test_text_of_groups_is_decoded() -> None:
    tokenizer = wordpiece()
    mask = torch.ones(1, 4, dtype=torch.bool)
    found = groups.make_groups([[(0, 3), (3, 4)]], None, None, tokenizer, mask, [["the", "cat", "##s", "##ing"]])
    assert found is not None
    assert found.texts == [["the cats", "##ing"]]


def test_words_of_text() -> None:
    found = words(["the cats playing zebra.", "a  cat"], wordpiece())
    assert found.index.tolist() == [[0, 1, 2, 2, 3, 3, 4, 5, 6], [0, 1, 2, 3, -1, -1, -1, -1, -1]]
    assert found.texts == [
        ["[CLS]", "the", "cats", "playing", "zebra", ".", "[SEP]"],
        ["[CLS]", "a", "cat", "[SEP]", "", "", ""],
    ]
    assert found.mask.sum(1).tolist() == [7, 4]
    assert words("cats", wordpiece()).index.tolist() == [[0, 1, 1, 2]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_words_of_a_batch_encoding(side: str) -> None:
    tokenizer = wordpiece()
    tokenizer.padding_side = side
    encoded = tokenizer(["the cats playing", "a zebra"], padding=True, return_tensors="pt")
    found = words(encoded, tokenizer)
    short = [0, 1, 2, 3]
    assert found.index.tolist() == [[0, 1, 2, 2, 3, 3, 4], [-1] * 3 + short if side == "left" else short + [-1] * 3]
    assert found.texts == [["[CLS]", "the", "cats", "playing", "[SEP]"], ["[CLS]", "a", "[UNK]", "[SEP]", ""]]
    found = words(encoded, None)  # without a tokenizer, tokens go by their ids
    assert found.texts[0] == ["2", "4", "5 6", "7 8", "3"]


def test_words_of_pairs_do_not_run_together() -> None:
    tokenizer = wordpiece()
    encoded = tokenizer("cats the", "the playing", return_tensors="pt")
    assert words(encoded, tokenizer).texts == [["[CLS]", "cats", "the", "[SEP]", "the", "playing", "[SEP]"]]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1")
    encoded = tokenizer("the", "playing", return_tensors="pt")  # the first word of each, side by side
    assert words(encoded, tokenizer).index.tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("encode", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_words_where_a_vocabulary_marks_them(split: bool, encode: bool) -> None:
    tokenizer = metaspace(split)
    text = "the cats x sat"
    found = words(tokenizer([text], return_tensors="pt") if encode else text, tokenizer)
    assert found.texts == [["the", "cats", "x", "sat"]]
    assert found.index.tolist() == [[0, 1, 1, 2, 2, 3]]


@pytest.mark.parametrize("encode", [False, True])
def test_white_space_splits_what_the_tokenizer_does_not(encode: bool) -> None:
    tokenizer = metaspace(split=False)
    text = "the   cat\nthe x the"
    found = words(tokenizer([text], return_tensors="pt") if encode else text, tokenizer)
    tokens = tokenizer(text).tokens()
    assert tokens == ["▁the", "▁▁", "▁cat", "<0x0A>", "the", "▁x▁", "the"]
    assert found.index.tolist() == [[0, 1, 1, 2, 2, 3, 4]]
    if not encode:
        assert found.texts == [["the", "cat", "the", "x", "the"]]


@pytest.mark.parametrize("encode", [False, True])
def test_words_of_bytes(encode: bool) -> None:
    tokenizer = byte_level()
    text = "cats cat\n cats"
    found = words(tokenizer([text], return_tensors="pt") if encode else text, tokenizer)
    assert found.texts == [["cats", "cat", "\n", "cats"]]
    assert found.index.tolist() == [[0, 0, 1, 2, 3, 3]]


def test_the_map_of_a_word_is_the_norm_of_its_summed_vectors() -> None:
    model, tokenizer = tiny_models.build("gpt2"), wordpiece()
    texts = ["a cats", "cats playing the cats."]
    attr = attribute(model, texts, tokenizer=tokenizer, groups="words")
    index = words(texts, tokenizer).index
    values = vectors(model, texts, tokenizer=tokenizer).values  # [L, B, N, T, d]
    assert attr.key_tokens is not None
    assert attr.key_tokens[1] == ["[CLS]", "cats", "playing", "the", "cats", ".", "[SEP]"]
    for column in range(7):
        members = (index == column)[None, :, None, :, None]
        torch.testing.assert_close(
            attr["layer"][..., column], (values * members).sum(-2).norm(dim=-1), rtol=1e-10, atol=1e-10
        )


def test_selected_keys_are_columns_of_the_whole_map() -> None:
    model, given = tiny_models.build("gpt2"), tiny_models.inputs("gpt2", padding="left")
    attr = attribute(model, given, keys=[5, 0])
    torch.testing.assert_close(attr["layer"], attribute(model, given)["layer"][..., [5, 0]], rtol=1e-10, atol=1e-10)


def unclear(inputs: Any, tokenizer: Any, ids: Any, message: str) -> None:
    names = tokenizer or wordpiece()
    tokens = [names.convert_ids_to_tokens(row) for row in ids.tolist()]
    with pytest.raises(ValueError, match=message + r".*\[batch, T\] of column numbers.*list of spans") as error:
        groups.make_groups("words", None, inputs, tokenizer, torch.ones(ids.shape, dtype=torch.bool), tokens)
    assert "'words'" in str(error.value)


def test_words_that_nobody_knows() -> None:
    class Slow:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [4, 5]}

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [str(i) for i in ids]

    ids = torch.tensor([[4, 5]])
    unclear("the cat", Slow(), ids, "Slow is no fast tokenizer")
    unclear(ids, wordpiece(), ids, "inputs, a Tensor, does not tell words apart")
    unclear({"input_ids": ids}, wordpiece(), ids, "inputs, a dict, is not what a fast tokenizer returned")
    unclear(BatchEncoding({"input_ids": ids}), wordpiece(), ids, "a BatchEncoding, is not what a fast tokenizer")


def test_an_encoding_that_no_longer_fits() -> None:
    tokenizer = wordpiece()
    encoded = tokenizer(["the cats"], return_tensors="pt")
    longer = torch.tensor([[2, 4, 5, 6, 3, 10]])
    unclear(encoded, tokenizer, longer, "token 5 of sequence 0 is 'a', but was none when")
    other = torch.tensor([[2, 4, 5, 8, 3]])
    unclear(encoded, tokenizer, other, "token 3 of sequence 0 is '##ing', but was '##s' when")
    with pytest.raises(ValueError, match="1 sequences were tokenised, but there are 2"):
        of("words", None, encoded, tokenizer)


LEFT_OUT = torch.full((2, 5), -1)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"asked": "words", "keys": 0}, ValueError, "keys and groups are both given"),
    ({"keys": [0, 5]}, IndexError, "keys has 5, but there are 5: expected -5 to 4"),
    ({"keys": [1, 2, -4]}, ValueError, "keys has position 1 more than once"),
    ({"keys": []}, ValueError, r"keys=\[\] selects none of 5 tokens"),
    ({"keys": "first"}, TypeError, "keys is 'first'"),
    ({"keys": [0.0]}, TypeError, "keys has 0.0, expected integers"),
    ({"asked": "sentences"}, ValueError, "unknown groups 'sentences', expected 'words'"),
    ({"asked": 3}, TypeError, "groups is a int, expected 'words'"),
    ({"asked": LEFT_OUT.float()}, TypeError, "groups has dtype torch.float32, expected integers"),
    ({"asked": LEFT_OUT.bool()}, TypeError, "groups has dtype torch.bool, expected integers"),
    ({"asked": LEFT_OUT[0]}, ValueError, r"groups has shape \(5,\), expected that of the tokens: \(2, 5\)"),
    ({"asked": LEFT_OUT}, ValueError, "groups leaves out all tokens"),
    ({"asked": LEFT_OUT - MASK.int()}, ValueError, r"groups\[0, 0\] is -2, expected a column"),
    ({"asked": MASK * torch.tensor([1, 1, 1, 3, 3])}, ValueError, "columns up to 3, but no token in column 0; number"),
    ({"asked": MASK * 10**12 * torch.tensor([0, 0, 0, 0, 1])}, ValueError, "but no token in column 1;"),
    ({"asked": [[(0, 1)]]}, ValueError, "groups has 1 lists of spans, expected one for each of the 2 sequences"),
    ({"asked": [(0, 1), (1, 2)]}, TypeError, r"groups\[0\]\[0\] is 0, expected a span \(start, stop\)"),
    ({"asked": [[(0, 1)], 3]}, TypeError, r"groups\[1\] is 3, expected the list of the sequence's spans"),
    ({"asked": [[(0, 1, 2)], []]}, TypeError, r"groups\[0\]\[0\] is \(0, 1, 2\), expected a span"),
    ({"asked": [[(0, True)], []]}, TypeError, r"groups\[0\]\[0\] is \(0, True\), expected a span"),
    ({"asked": [[(0, 1.0)], []]}, TypeError, r"groups\[0\]\[0\] is \(0, 1.0\), expected a span"),
    ({"asked": [[(2, 2)], []]}, ValueError, r"groups\[0\]\[0\] is \(2, 2\), expected start < stop, both from 0 to 5"),
    ({"asked": [[(3, 6)], []]}, ValueError, r"groups\[0\]\[0\] is \(3, 6\), expected start < stop"),
    ({"asked": [[(-2, 2)], []]}, ValueError, r"groups\[0\]\[0\] is \(-2, 2\), expected start < stop"),
    (
        {"asked": [[(4, 5), (2, 4), (0, 3)], []]},
        ValueError,
        r"groups\[0\]\[2\] is \(0, 3\) and overlaps groups\[0\]\[1\], \(2, 4\)",
    ),
    ({"asked": [[], [(0, 2)]]}, ValueError, r"groups\[1\]\[0\] is \(0, 2\), where there is only padding; leave it out"),
    ({"asked": [[], []]}, ValueError, "groups has no spans"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_errors(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        of(**given)
