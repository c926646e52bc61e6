"""What kind of pair two tokens are: pieces of one word, neighbours, parts of a compound, of a name.

Shapes: ``T`` tokens of a sequence; ``p`` pairs, or any shapes that broadcast.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .rows import NamedMaps
from .words import MARKS, Words, mark_of

if TYPE_CHECKING:
    import numpy
    import pandas

__all__ = ["Categories", "Kinds", "Nlp", "categorize_pairs", "pair_categories", "read_kinds"]

_BY_WORDS = ("subwords", "adjacent", "repeated", "special_or_punctuation")
_BY_GRAMMAR = ("compound", "verb_object", "verb_subject", "named_entity")
_MODIFIERS = ("compound", "nmod")
_OBJECTS = ("dobj", "obj")  # English models of spaCy say dobj, Universal Dependencies obj
_SUBJECTS = ("nsubj", "nsubjpass", "nsubj:pass")


class Nlp(Protocol):
    """Names what is used of a spaCy pipeline."""

    @property
    def vocab(self) -> Any: ...
    def make_doc(self, text: str, /) -> Any: ...
    def __call__(self, text: Any, /) -> Any: ...


def pair_categories(
    tokens: Sequence[str],
    *,
    nlp: Nlp | None = None,
    special: Collection[str] | None = None,
    words: Sequence[int | None] | None = None,
) -> dict[str, Tensor]:
    """Returns the categories of all pairs of one sequence's tokens, without padding: bool ``[T, T]`` each, by name.

    All are symmetric and may overlap; none holds for a token and itself. See `Categories`, whose ``words`` are of many
    sequences, these of one.

    >>> found = ffattr.analysis.pair_categories(["[CLS]", "dog", "##s", "bark", "!"])
    >>> found["subwords"].nonzero().tolist(), found["other"].nonzero().tolist()
    ([[1, 2], [2, 1]], [])
    """
    if not isinstance(tokens, Sequence) or not all(isinstance(token, str) for token in tokens):
        raise TypeError(f"tokens is {str(tokens)[:80]}, expected a list of texts")
    if words is not None and (not isinstance(words, Sequence) or isinstance(words, str)):
        raise TypeError(f"words is {str(words)[:80]}, expected a number for each token, or None")
    if words is not None and len(words) != len(tokens):
        raise ValueError(f"words has {len(words)} entries, expected one for each of {len(tokens)} tokens")
    chosen = Categories(nlp, special)
    kinds = Kinds.from_words(Words.from_tokens(tokens, mark_of(tokens), chosen.special, words), chosen.nlp)
    at = torch.arange(len(tokens))
    return kinds(at[:, None], at)


@dataclass(frozen=True)
class Categories:
    """Says which categories pairs of tokens are told apart by. A pair may be in several.

    ``subwords``: two pieces of one word. ``adjacent``: of neighbouring words; punctuation and special tokens count as
    words here. ``repeated``: of two occurrences of the same word, whatever its case; not of punctuation.
    ``special_or_punctuation``: one of them is a special token, or has no letter and no digit. ``other``: no category.

    nlp: a spaCy pipeline with a parser and an entity recogniser, say ``spacy.load("en_core_web_sm")``, for four more.
        ``compound``: two words of a noun compound, chains of a noun that modifies a later one (``compound``, ``nmod``).
        ``verb_object``: a word and its direct object; ``verb_subject``: a word and its subject, of a passive too.
        ``named_entity``: two tokens of one name. It reads the words that the tokens make up, one space between them.
    special: the tokens that are no text. None: those in brackets, as ``[SEP]``, ``<s>`` and ``<|endoftext|>`` are.
    words: for each sequence the number of each token's word, as ``BatchEncoding.word_ids`` has them (None: a special
        token). Needed where tokens do not show which word they belong to: without ``words`` that is told by the marks
        of WordPiece (``##``), byte-level BPE (``Ġ``), SentencePiece (``▁``) and BPE (``</w>``, ``@@``); punctuation is
        a word of its own then, and where no token has a mark each one is.
    mark: which of these marks tells (None: the one that most tokens bear). Say it where few tokens are seen at a time.

    >>> ffattr.analysis.Categories().names
    ('subwords', 'adjacent', 'repeated', 'special_or_punctuation', 'other')
    """

    nlp: Nlp | None = None
    special: Collection[str] | None = None
    words: Sequence[Sequence[int | None]] | None = None
    mark: str | None = None

    def __post_init__(self) -> None:
        if self.nlp is not None and not (callable(self.nlp) and hasattr(self.nlp, "vocab")):
            raise TypeError(f"nlp={self.nlp!r}, expected a loaded spaCy pipeline: spacy.load('en_core_web_sm')")
        if isinstance(self.special, str):
            raise TypeError(f"special={self.special!r}, expected a set of tokens: {{{self.special!r}}}")
        if self.mark is not None and self.mark not in MARKS:
            raise ValueError(f"unknown mark {self.mark!r}, expected one of {', '.join(MARKS)}, or None")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all categories, in order."""
        return (*_BY_WORDS, *(_BY_GRAMMAR if self.nlp is not None else ()), "other")


def read_kinds(
    attribution: NamedMaps, categories: Categories, batches: Collection[int] | None = None
) -> dict[int, Kinds]:
    """Returns the kinds of tokens of each sequence of ``batches`` (None: all), by their position; none at padding.

    Raises ValueError for maps whose columns are not the tokens of their rows, and for ``words`` of other sequences.
    """
    if attribution.key_mask is not None:
        raise ValueError(
            "categories are of pairs of tokens, but the columns of these maps are not the tokens of their rows: they "
            "have none (categories=None)"
        )
    masks, words = attribution.mask.cpu(), categories.words
    names = attribution.tokens or [[str(at) for at in range(masks.shape[1])]] * len(masks)
    if words is not None and [len(of) for of in words] != [masks.shape[1]] * len(masks):
        raise ValueError(
            f"words has {[len(of) for of in words]} entries, expected {masks.shape[1]} (one for each token, padding "
            f"included) for each of {len(masks)} sequences"
        )
    mark = categories.mark or mark_of(chain.from_iterable(names))
    found = {}
    for batch in range(len(masks)) if batches is None else sorted(batches):
        places = masks[batch].nonzero()[:, 0]
        given = None if words is None else [words[batch][at] for at in places.tolist()]
        read = Words.from_tokens([names[batch][at] for at in places.tolist()], mark, categories.special, given)
        found[batch] = Kinds.from_words(read, categories.nlp).place_at(places, masks.shape[1])
    return found


def categorize_pairs(
    pairs: pandas.DataFrame, attribution: NamedMaps, categories: Categories
) -> dict[str, numpy.ndarray[Any, Any]]:
    """Returns by the name of a category whether each row of ``pairs`` (``batch``, ``query``, ``key``) is in it, bool
    ``[p]``. Raises ValueError as `read_kinds` does."""
    import numpy as np

    found = {name: np.zeros(len(pairs), dtype=bool) for name in categories.names}
    batch = pairs["batch"].to_numpy()
    query, key = (torch.tensor(pairs[name].to_numpy(dtype="int64", copy=True)) for name in ("query", "key"))
    for number, kinds in read_kinds(attribution, categories, set(batch.tolist())).items():
        at = np.flatnonzero(batch == number)
        for name, holds in kinds(query[at], key[at]).items():
            found[name][at] = holds.numpy()
    return found


@dataclass(frozen=True)
class Kinds:
    """Holds for each token ``[T]`` its ``word``, the number of that word's text (-1: it is none), whether it stands
    ``apart`` (special, punctuation), and what there is of grammar: the number of what it is in (-1: nothing) in
    ``groups``, the word that its word belongs to (-1: none) in ``heads``."""

    word: Tensor
    text: Tensor
    apart: Tensor
    groups: dict[str, Tensor]
    heads: dict[str, Tensor]

    @classmethod
    def from_words(cls, words: Words, nlp: Nlp | None) -> Kinds:
        grammar = None if nlp is None else _Grammar.from_words(words, nlp)
        apart = [special or symbols for special, symbols in zip(words.special, words.symbols, strict=True)]
        no_words = {word for word, one in zip(words.number, words.special, strict=True) if one}
        same: dict[str, int] = {}
        texts = []
        for word, text in enumerate(words.texts):
            plain = word not in no_words and any(letter.isalnum() for letter in text)
            texts.append(same.setdefault(text.casefold(), len(same)) if plain else -1)
        number = torch.tensor(words.number, dtype=torch.int64)

        def repeat_for_tokens(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64)[number]

        groups = {} if grammar is None else {"compound": grammar.compound, "named_entity": grammar.entity}
        heads = {} if grammar is None else {"verb_object": grammar.object_of, "verb_subject": grammar.subject_of}
        return cls(
            number,
            repeat_for_tokens(texts),
            torch.tensor(apart, dtype=torch.bool),
            {name: repeat_for_tokens(values) for name, values in groups.items()},
            {name: repeat_for_tokens(values) for name, values in heads.items()},
        )

    def place_at(self, places: Tensor, tokens: int) -> Kinds:
        """Returns the same for tokens that are at ``places`` of ``tokens`` positions."""

        def scatter_values(values: Tensor) -> Tensor:
            return values.new_full((tokens,), -1 if values.dtype == torch.int64 else 0).index_copy(0, places, values)

        groups, heads = ({name: scatter_values(v) for name, v in of.items()} for of in (self.groups, self.heads))
        return Kinds(scatter_values(self.word), scatter_values(self.text), scatter_values(self.apart), groups, heads)

    def __call__(self, queries: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """Returns by name whether each pair of positions is in a category. Shapes broadcast."""
        others = queries != keys
        apart = self.word[queries] - self.word[keys]  # how many words

        def share_number(of: Tensor) -> Tensor:
            return (of[queries] == of[keys]) & (of[queries] >= 0) & others

        found = {
            "subwords": (apart == 0) & others,
            "adjacent": apart.abs() == 1,
            "repeated": share_number(self.text) & (apart != 0),
            "special_or_punctuation": (self.apart[queries] | self.apart[keys]) & others,
        }
        for name in _BY_GRAMMAR:
            if name in self.heads:
                head = self.heads[name]
                found[name] = (head[queries] == self.word[keys]) | (head[keys] == self.word[queries])
            elif name in self.groups:
                found[name] = share_number(self.groups[name]) & ((apart != 0) | (name != "compound"))
        found["other"] = others & ~torch.stack(list(found.values())).any(0)
        return found


@dataclass(frozen=True)
class _Grammar:
    """Holds for each word the number of its ``compound`` and of its ``entity``, and the words that it is ``object_of``
    and ``subject_of``; -1: none."""

    compound: list[int]
    entity: list[int]
    object_of: list[int]
    subject_of: list[int]

    @classmethod
    def from_words(cls, words: Words, nlp: Nlp) -> _Grammar:
        """Reads the words with the pipeline. Raises ValueError where it lacks a parser or an entity recogniser."""
        empty = {word for word, one in zip(words.number, words.special, strict=True) if one}
        said = [word for word, text in enumerate(words.texts) if text and word not in empty]
        found = cls(*([-1] * len(words.texts) for _ in range(4)))
        if not said:
            return found
        kind = type(nlp.make_doc(""))  # spacy.tokens.Doc, which the pipeline brings along
        doc = nlp(kind(nlp.vocab, words=[words.texts[word] for word in said]))
        for annotation, maker in (("DEP", "parser"), ("ENT_IOB", "entity recogniser")):
            if not doc.has_annotation(annotation):
                raise ValueError(
                    f"nlp has no {maker}: give a spaCy pipeline that has, say spacy.load('en_core_web_sm')"
                )
        for token in doc:
            word, head = said[token.i], said[token.head.i]
            if token.dep_ in _OBJECTS:
                found.object_of[word] = head
            elif token.dep_ in _SUBJECTS:
                found.subject_of[word] = head
        for token in reversed(doc):  # what is modified comes later, and has its number then
            if token.dep_ in _MODIFIERS and token.i < token.head.i:
                head = said[token.head.i]
                if found.compound[head] < 0:
                    found.compound[head] = head
                found.compound[said[token.i]] = found.compound[head]
        for number, entity in enumerate(doc.ents):
            for token in entity:
                found.entity[said[token.i]] = number
        return found
