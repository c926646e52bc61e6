"""The words of a sequence by the marks on its tokens."""

import pytest

from ffattr.analysis.words import Words, mark_of, spell_tokens

BEGIN = "<\uff5cbegin▁of▁sentence\uff5c>"  # of DeepSeek


def words_of(tokens, **how):
    return Words.from_tokens(tokens, mark_of(tokens), **how)


@pytest.mark.parametrize(
    ("sentence", "texts"),
    [
        ('don \'t Ġsay Ġ" no "', ["don't", "say", '"', "no", '"']),
        ("Ġcaf Ã© ĠðŁĺ Ģ", ["café", "😀"]),  # characters cut between tokens
        ("ĠĠĠ Ġreturn Ċ Ċ x", ["", "return", "", "", "x"]),  # space is a word of its own
        ("▁the ▁ 42 ▁ (", ["the", "42", "", "("]),  # a bare mark begins a word, but not punctuation
        ("▁a <0xE4> <0xBD> <0xA0> ▁b", ["a你", "b"]),
        ("well - known ##s", ["well", "-", "knowns"]),
        ("a b c", ["a", "b", "c"]),
        ("", []),
    ],
)
def test_words_by_marks(sentence, texts):
    assert words_of(sentence.split()).texts == texts


def test_marks_are_those_of_most_tokens():
    assert mark_of(["Ġa", "Ġb", "##c"]) == "Ġ"
    assert mark_of(["##a", "b", "▁"]) == "##"
    assert mark_of(["a", "Ċ"]) == "Ġ"
    assert mark_of([BEGIN, "ab", "c"]) is None


@pytest.mark.parametrize(
    ("token", "special"),
    [
        *((token, True) for token in ("[CLS]", "[unused12]", "<s>", "</s>", "<|endoftext|>", "<|0.00|>", "<pad>")),
        *((token, True) for token in ("<start_of_turn>", "<extra_id_0>", BEGIN, "[MASK]", "[E1]")),
        *((token, False) for token in ("<0x0A>", "<", "<-", "<=>", "[", "[]", "cls", "[1]", "[x]", "Ġ<s>")),
    ],
)
def test_special_tokens_are_in_brackets(token, special):
    assert words_of([token, "x"]).special == [special, False]


def test_signs_without_letters_are_parts_of_words():
    """A Hindi vowel sign, and a digit."""
    assert words_of(["ह", "##ि", "##7", "##।"]).symbols == [False, False, False, True]


@pytest.mark.parametrize(
    "sentence",
    [
        "the token ##s split",
        "the Ġtoken s Ġsplit",
        "▁the ▁token s ▁split",
        "the</w> token s</w> split</w>",
        "the token@@ s split",
    ],
)
def test_pieces_have_the_number_of_their_word(sentence):
    found = words_of(sentence.split())
    assert found.number == [0, 1, 1, 2]
    assert found.texts == ["the", "tokens", "split"]


def test_numbers_of_words_that_are_said_go_before_marks():
    found = Words.from_tokens(["Ġa", "Ġb", "c", ".", "x"], "Ġ", special=(), words=[0, 0, 1, 1, None])
    assert found.number == [0, 0, 1, 1, 2]
    assert found.texts == ["a b", "c.", "x"]
    assert found.special == [False] * 4 + [True]


def test_half_a_character_is_no_symbol_and_is_replaced_in_the_text():
    found = Words.from_tokens(["▁a", "<0xE4>"], "▁")
    assert (found.texts, found.symbols) == (["a\ufffd"], [False, False])


@pytest.mark.parametrize(
    ("sentence", "texts"),
    [
        ("The ĠE iffel ĠTower . Ċ <|im_end|> Ġx", ["The", " E", "iffel", " Tower", ".", "\n", "<|im_end|>", " x"]),
        ("<s> ▁un believ able ▁!", ["<s>", " un", "believ", "able", " !"]),
        ("[CLS] a dog ##s ( it ' s ) , no ! [SEP]", None),
        ("ca fe</w> no</w> .</w>", ["ca", "fe", " no", "."]),
        ("Ġcaf Ã ©", [" caf", "Ã", "©"]),
        ("two words here .", ["two", " words", " here", "."]),
        ("", []),
    ],
)
def test_tokens_spelled_are_the_running_text(sentence, texts):
    found = spell_tokens(sentence.split())
    if texts is None:
        assert "".join(found) == "[CLS] a dogs (it ' s), no! [SEP]"
    else:
        assert found == texts


@pytest.mark.parametrize(
    ("tokens", "sentences"),
    [
        ("[CLS] dogs bark . mr . x [SEP]", ["[CLS]", "dogs bark.", "mr.", "x", "[SEP]"]),
        ('she said : " go ! " he went ##s .', ['she said: " go! "', "he wents."]),
        ("it costs 3 . 5 euros", ["it costs 3. 5 euros"]),  # no tokenizer's mark tells a space there
        ("Is Ġit Ġ3 . 5 ? ĊNew Ġline Ġ( yes .) ĠBye", ["Is it 3.5?", "New", "line (yes.)", "Bye"]),
        ("Ġexample . com Ġis . ĠOK", ["example.com is.", "OK"]),
        ("今 天 。 明 天 。", ["今 天 。", "明 天 。"]),
        ("a . . . b", ["a...", "b"]),
        ("", []),
    ],
)
def test_sentences(tokens, sentences):
    pieces = tokens.split()
    found = Words.from_sentences(pieces, mark_of(pieces))
    assert found.texts == sentences
    assert len(found.number) == len(pieces)
    assert sorted(set(found.number)) == list(range(len(sentences)))
