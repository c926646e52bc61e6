"""Which text a row is of."""

import pandas as pd
import pytest
from made_tokenizers import make_tokenizer

from ffattr.study.origins import Origin, pick_texts, shorten_text, tell_origins


def test_rows_say_their_text_and_only_what_is_known():
    frame = pd.DataFrame({"layer": [0, 0, 1], "batch": [5, 6, 5], "value": [0.1, 0.2, 0.3]})
    found = tell_origins(frame, [Origin("one\n text", 3), Origin("two", 9)], first=5)
    assert list(found) == ["layer", "batch", "line", "text", "value"]
    assert found[["line", "text"]].values.tolist() == [[3, "one text"], [9, "two"], [3, "one text"]]
    assert list(frame) == ["layer", "batch", "value"]
    named = tell_origins(frame, [Origin("a", 1, "f.txt", "x"), Origin("b", 2, "f.txt")], first=5)
    assert named[["source", "id"]].iloc[0].tolist() == ["f.txt", "x"]
    without = frame.drop(columns="batch")
    assert tell_origins(without, [Origin("a")]) is without


def test_long_texts_are_cut_in_tables():
    assert shorten_text("a" * 200) == "a" * 200
    assert shorten_text("a" * 201) == "a" * 199 + "…"


@pytest.mark.parametrize(("most", "left"), [(None, [1, 3]), (4, [1])])
def test_texts_that_cannot_be_read(most, left):
    tokenizer = make_tokenizer(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    good, refused = pick_texts("m", ["the cat", " ", "the cat sat on a mat"], tokenizer, most, "skip")
    assert [origin.line for origin in good] == left
    assert [one.origin.line for one in refused] == [line for line in (1, 2, 3) if line not in left]
