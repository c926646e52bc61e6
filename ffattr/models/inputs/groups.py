"""Which key tokens a map has columns for: selected ones, or groups of tokens, whose vectors are added up.

Shapes: ``B`` sequences of ``T`` tokens, padding included, and ``C`` columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...selection import Indices, indices
from .sequences import as_texts
from .text import name_ids

__all__ = ["Groups", "make_groups"]

_REMEDY = (
    "Pass text with the model's fast tokenizer or what such a tokenizer returned; or else the groups themselves: an "
    "integer tensor [batch, T] of column numbers, -1 for tokens left out, or for each sequence a list of spans "
    "(start, stop)."
)


@dataclass(frozen=True)
class Groups:
    """The column of each token, ``index`` ``[B, T]`` int64 (-1: none, as of padding), and which columns each sequence
    has, ``mask`` ``[B, C]``; ``texts`` ``[B][C]`` is "" where it has none."""

    index: Tensor
    texts: list[list[str]]
    mask: Tensor


def make_groups(
    groups: Any,
    keys: Indices,
    inputs: Any,
    tokenizer: Any,
    mask: Tensor,
    tokens: Sequence[Sequence[str]],
    labels: Sequence[Sequence[str]] | None = None,
) -> Groups | None:
    """Makes what ``groups`` and ``keys`` of `ffattr.attribute` ask for; None where neither asks for anything.

    ``inputs`` and ``tokenizer`` are those of the user, ``mask`` ``[B, T]``, ``tokens`` ``[B][T]`` and ``labels``, these
    in the case of the text (None: no others), what became of them. Words are what the tokenizer splits text into before
    it looks up parts of them: punctuation is apart where it does that, and what it does not split, `make_groups` splits
    at white space.

    Raises TypeError, ValueError or IndexError that names the offending value.
    """
    names = tokens if labels is None else labels
    if groups is not None and keys is not None:
        raise ValueError(
            "keys and groups are both given, expected one of them: for single tokens among groups pass spans of one "
            "token, (position, position + 1)"
        )
    if keys is not None:
        return _group_by_keys(keys, mask, names)
    if groups is None:
        return None

    def join_tokens(batch: int, places: list[int]) -> str:
        return _join_texts([names[batch][place] for place in places], tokenizer)

    if isinstance(groups, str):
        if groups != "words":
            raise ValueError(f"unknown groups {groups!r}, expected 'words', a tensor [batch, T] or lists of spans")
        return _group_by_words(inputs, tokenizer, mask, tokens, join_tokens)
    if isinstance(groups, Tensor):
        return _group_by_index(_check_numbers(groups, mask), join_tokens)
    if isinstance(groups, Sequence):
        return _group_by_index(_number_spans(groups, mask), join_tokens)
    raise TypeError(
        f"groups is a {type(groups).__name__}, expected 'words', an integer tensor [batch, T] or for each sequence a "
        "list of spans (start, stop)"
    )


def _group_by_index(index: Tensor, text: Callable[[int, list[int]], str], count: int | None = None) -> Groups:
    """Makes groups of ``index`` ``[B, T]``. ``text`` names the tokens of a column; no ``count``: the columns in use."""
    count = int(index.max()) + 1 if count is None else count
    texts, there = [], []
    for batch, row in enumerate(index.tolist()):
        members: list[list[int]] = [[] for _ in range(count)]
        for place, column in enumerate(row):
            if column >= 0:
                members[column].append(place)
        texts.append([text(batch, places) if places else "" for places in members])
        there.append([bool(places) for places in members])
    return Groups(index, texts, torch.tensor(there, dtype=torch.bool, device=index.device))


def _group_by_keys(keys: Indices, mask: Tensor, tokens: Sequence[Sequence[str]]) -> Groups:
    asked = indices("keys", keys, mask.shape[1])
    if not asked:
        raise ValueError(f"keys={keys!r} selects none of {mask.shape[1]} tokens, expected at least one")
    if len(set(asked)) < len(asked):
        twice = next(key for key in asked if asked.count(key) > 1)
        raise ValueError(f"keys has position {twice} more than once, expected distinct ones")
    column = torch.full((mask.shape[1],), -1, dtype=torch.int64)
    column[list(asked)] = torch.arange(len(asked))
    index = column.to(mask.device).expand(mask.shape).masked_fill(~mask, -1)
    return _group_by_index(index, lambda batch, places: tokens[batch][places[0]], len(asked))


def _check_numbers(groups: Tensor, mask: Tensor) -> Tensor:
    integer = not (groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool)
    if not integer:
        raise TypeError(f"groups has dtype {groups.dtype}, expected integers: the column of each token, -1 for none")
    if groups.shape != mask.shape:
        raise ValueError(f"groups has shape {tuple(groups.shape)}, expected that of the tokens: {tuple(mask.shape)}")
    index = groups.to(mask.device, torch.int64).masked_fill(~mask, -1)
    if (index < -1).any():
        row, place = (index < -1).nonzero()[0].tolist()
        number = int(index[row, place])
        raise ValueError(f"groups[{row}, {place}] is {number}, expected a column, from 0 on, or -1 for none")
    used = index[index >= 0].unique()
    if not len(used):
        raise ValueError("groups leaves out all tokens that are no padding; expected at least one column")
    gaps = (used != torch.arange(len(used), device=used.device)).nonzero()
    if len(gaps):
        missing, most = int(gaps[0]), int(used[-1])
        raise ValueError(f"groups has columns up to {most}, but no token in column {missing}; number them without gaps")
    return index


def _number_spans(groups: Sequence[Any], mask: Tensor) -> Tensor:
    batch, length = mask.shape
    if len(groups) != batch:
        raise ValueError(f"groups has {len(groups)} lists of spans, expected one for each of the {batch} sequences")
    index = torch.full((batch, length), -1, dtype=torch.int64)
    real = mask.cpu()
    for row, spans in enumerate(groups):
        if not isinstance(spans, Sequence) or isinstance(spans, str):
            raise TypeError(f"groups[{row}] is {spans!r}, expected the list of the sequence's spans (start, stop)")
        for column, span in enumerate(spans):
            start, stop = _check_span(f"groups[{row}][{column}]", span, length)
            if (index[row, start:stop] >= 0).any():
                other = int(index[row, start:stop].max())
                raise ValueError(
                    f"groups[{row}][{column}] is {span!r} and overlaps groups[{row}][{other}], {spans[other]!r}; "
                    "expected each token in one span at most"
                )
            if not real[row, start:stop].any():
                raise ValueError(f"groups[{row}][{column}] is {span!r}, where there is only padding; leave it out")
            index[row, start:stop] = column
    if (index < 0).all():
        raise ValueError("groups has no spans; expected at least one")
    return index.to(mask.device).masked_fill(~mask, -1)


def _check_span(name: str, span: Any, length: int) -> tuple[int, int]:
    numbers = list(span) if isinstance(span, (tuple, list)) else []
    if len(numbers) != 2 or any(not isinstance(number, int) or isinstance(number, bool) for number in numbers):
        raise TypeError(f"{name} is {span!r}, expected a span (start, stop) of positions in the sequence")
    start, stop = numbers
    if not 0 <= start < stop <= length:
        raise ValueError(f"{name} is {span!r}, expected start < stop, both from 0 to {length}")
    return start, stop


def _group_by_words(
    inputs: Any,
    tokenizer: Any,
    mask: Tensor,
    tokens: Sequence[Sequence[str]],
    join_tokens: Callable[[int, list[int]], str],
) -> Groups:
    texts = as_texts(inputs)
    encodings = _find_encodings(inputs, texts, tokenizer)
    if len(encodings) != len(mask):
        raise ValueError(f"groups='words': {len(encodings)} sequences were tokenised, but there are {len(mask)}")
    index = torch.full(mask.shape, -1, dtype=torch.int64)
    for row, (encoding, real) in enumerate(zip(encodings, mask.tolist(), strict=True)):
        places = [place for place, valid in enumerate(real) if valid]
        known = name_ids(encoding.ids, tokenizer)
        for place in places:
            if place >= len(known) or known[place] != tokens[row][place]:
                made = repr(known[place]) if place < len(known) else "none"
                raise ValueError(
                    f"groups='words': token {place} of sequence {row} is {tokens[row][place]!r}, but was {made} when "
                    f"the text was tokenised. {_REMEDY}"
                )
        text = None if texts is None else texts[row]
        index[row, places] = torch.tensor(list(_number_words(encoding, places, text)))
    offsets = [encoding.offsets for encoding in encodings]

    def name_word(batch: int, places: list[int]) -> str:
        spans = [offsets[batch][place] for place in places]
        found = "" if texts is None else texts[batch][min(start for start, _ in spans) : max(stop for _, stop in spans)]
        return found.strip() or join_tokens(batch, places)

    return _group_by_index(index.to(mask.device), name_word)


def _find_encodings(inputs: Any, texts: list[str] | None, tokenizer: Any) -> list[Any]:
    """Returns what the fast tokenizer knows of each sequence. Raises ValueError where there is none."""
    if texts is not None:
        found: list[Any] = []
        for text in texts:
            of_text = getattr(tokenizer(text), "encodings", None)
            if of_text is None:
                raise ValueError(f"groups='words': {type(tokenizer).__name__} is no fast tokenizer. {_REMEDY}")
            found += of_text
        return found
    encodings = getattr(inputs, "encodings", None)
    if encodings is None:
        kind = type(inputs).__name__
        what = "is not what a fast tokenizer returned" if isinstance(inputs, Mapping) else "does not tell words apart"
        raise ValueError(f"groups='words': inputs, a {kind}, {what}. {_REMEDY}")
    return list(encodings)


def _number_words(encoding: Any, places: Sequence[int], text: str | None) -> Iterator[int]:
    """Yields the column of each of the tokens ``places``: words from left to right, special tokens each their own.

    Some tokenizers (Llama's, Gemma's) take a whole text for one word: white space splits that as well.
    """
    words = list(zip(encoding.sequence_ids, encoding.word_ids, strict=True))  # words are counted in each part of a pair
    if text is None:
        surfaces = ["\n" if token == "<0x0A>" else token.replace("▁", " ") for token in encoding.tokens]
    else:
        surfaces = [text[start:stop] for start, stop in encoding.offsets]
    column, last, before = -1, None, ""
    for place in places:
        this, surface = None if words[place][1] is None else words[place], surfaces[place]
        apart = surface[:1].isspace() or before[-1:].isspace()
        if this is None or this != last or (apart and before.strip()):
            column, before = column + 1, ""
        last, before = this, before + surface
        yield column


def _join_texts(pieces: list[str], tokenizer: Any) -> str:
    convert = getattr(tokenizer, "convert_tokens_to_string", None)
    found = " ".join(pieces) if convert is None else str(convert(pieces))
    return found.strip() or found or " ".join(pieces)
