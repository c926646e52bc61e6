"""Tokens as a reader knows them: in the case, and with the accents, that the text has where a tokenizer drops them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

__all__ = ["label_texts", "label_tokens"]

_BEGINS = ("##", "\u0120", "\u2581")  # marks before what a token says: WordPiece, byte-level BPE, SentencePiece
_ENDS = ("</w>", "@@")  # and behind it


def label_tokens(tokens: Sequence[str], text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """Returns the tokens of a text with its letters and the tokenizer's marks, ``##ING`` for ``##ing``.

    ``spans`` are the characters ``(start, stop)`` that each token was made of. A token that says something else than
    these, as ``[UNK]`` and a part of a character do, stays what it is, and so do those beyond the spans: padding.

    >>> from ffattr.models.inputs.labels import label_tokens
    >>> label_tokens(["[CLS]", "cafe", "##s", "[SEP]"], "Cafés", [(0, 0), (0, 4), (4, 5), (0, 0)])
    ['[CLS]', 'Café', '##s', '[SEP]']
    """
    found = list(tokens)
    for place, (token, (start, stop)) in enumerate(zip(tokens, spans, strict=False)):
        said, bare = text[start:stop].strip(), _strip_marks(token)
        if said and bare and said != bare and _fold(said) == _fold(bare):
            before = token.index(bare)
            found[place] = token[:before] + said + token[before + len(bare) :]
    return found


def label_texts(
    tokens: Sequence[Sequence[str]], texts: Sequence[str] | None, spans: Sequence[Sequence[tuple[int, int]] | None]
) -> list[list[str]] | None:
    """Returns `label_tokens` of each text; None where no token differs, or nobody knows the texts."""
    if texts is None or len(texts) != len(tokens):
        return None
    both = zip(tokens, texts, spans, strict=True)
    found = [list(of) if places is None else label_tokens(of, text, places) for of, text, places in both]
    return None if all(map(list.__eq__, found, map(list, tokens))) else found


def _strip_marks(token: str) -> str:
    for mark in _BEGINS:
        token = token.removeprefix(mark)
    for mark in _ENDS:
        token = token.removesuffix(mark)
    return token


def _fold(text: str) -> str:
    """Returns a text without case and accents."""
    if text.isascii():
        return text.lower()
    return "".join(one for one in unicodedata.normalize("NFKD", text.lower()) if unicodedata.category(one) != "Mn")
