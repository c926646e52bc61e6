"""The words of a sequence, read off the marks that tokenizers leave on its tokens.

Shapes: ``T`` tokens.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

__all__ = ["MARKS", "Words", "mark_of", "spell_tokens"]

MARKS: dict[str, Callable[[str], bool]] = {
    "##": lambda token: token.startswith("##"),  # WordPiece: goes on
    "Ġ": lambda token: token.startswith(("Ġ", "Ċ")),  # byte-level BPE: a space or a line break begins it
    "▁": lambda token: token.startswith("▁"),  # SentencePiece: a space begins it
    "</w>": lambda token: token.endswith("</w>"),  # BPE: its word ends
    "@@": lambda token: token.endswith("@@"),  # BPE: its word goes on
}
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece: a byte of a character that has no token
_SPECIAL = re.compile(r"\[(?:[A-Z][A-Z0-9_ ]*|unused\d+)\]|<[|\uff5c].*[|\uff5c]>|<(?!0x)[^<>\s]*[A-Za-z][^<>\s]*>")

_ENDS = re.compile(r".*[.!?\u2026\u3002\uff01\uff1f]", re.DOTALL)  # a sentence, with what closes behind it
_CLOSES = re.compile(r"[.,;:!?%)\]}\u2019\u201d\u2026]+|['\u2019](?:s|t|re|ve|ll|d|m)", re.IGNORECASE)


@dataclass(frozen=True)
class Words:
    """Holds each token's word, ``number`` ``[T]``, and what the words are, ``texts``.

    ``special`` ``[T]`` is True at tokens that are no text, ``symbols`` ``[T]`` at those of no letter and no digit:
    punctuation, space. Each of these is a word of its own; a bare mark of a space belongs to the word that it begins.
    """

    number: list[int]
    texts: list[str]
    special: list[bool]
    symbols: list[bool]

    @classmethod
    def from_tokens(
        cls,
        tokens: Sequence[str],
        mark: str | None,
        special: Collection[str] | None = None,
        words: Sequence[int | None] | None = None,
    ) -> Words:
        """Reads the words of ``tokens``.

        mark: the tokens' kind of mark (`mark_of`; None: every token is a word).
        special: the tokens that are no text (None: those in brackets as ``[SEP]``, ``<s>``, ``<|endoftext|>``).
        words: the number of each token's word where marks do not tell (None: it is special).
        """
        apart = [_SPECIAL.fullmatch(token) is not None if special is None else token in special for token in tokens]
        if words is not None:
            apart = [found or word is None for found, word in zip(apart, words, strict=True)]
        pieces = [_read_piece(token, None if one else mark) for token, one in zip(tokens, apart, strict=True)]
        symbols = [not one and _has_only_symbols(piece) for piece, one in zip(pieces, apart, strict=True)]
        number: list[int] = []
        for at, token in enumerate(tokens):
            if at == 0:
                begins = True
            elif words is not None:
                begins = apart[at] or apart[at - 1] or words[at] != words[at - 1]
            else:
                closed = apart[at - 1] or (symbols[at - 1] and tokens[at - 1] != mark)
                begins = closed or apart[at] or symbols[at] or _begins_word(token, tokens[at - 1], pieces[at], mark)
            number.append(number[-1] + begins if at else 0)
        joined = [b""] * (number[-1] + 1 if number else 0)
        for word, piece in zip(number, pieces, strict=True):
            joined[word] += piece
        return cls(number, [text.decode("utf-8", "replace").strip() for text in joined], apart, symbols)

    @classmethod
    def from_sentences(cls, tokens: Sequence[str], mark: str | None) -> Words:
        """Reads sentences instead of words.

        One ends behind ``.``, ``!``, ``?`` or ``…`` and what closes behind it, where a space follows or the tokenizer
        tells none; and at a line break. A point between digits ends none, that of an abbreviation does.
        """
        words, spelled = cls.from_tokens(tokens, mark), spell_tokens(tokens)
        number: list[int] = []
        texts: list[str] = []
        ended = False
        for at, piece in enumerate(spelled):
            begins = at == 0 or words.special[at] or words.special[at - 1]
            closes = ended and not begins and _is_closing(piece, texts[-1])
            if ended and not begins and not closes and not _is_decimal(spelled[at - 2 : at + 1]):
                before = spelled[at - 1]
                begins = piece[:1].isspace() or before[-1:].isspace() or not before.isascii()
            if begins:
                texts.append("")
            number.append(len(texts) - 1)
            texts[-1] += piece
            ended = closes or "\n" in piece or (words.symbols[at] and _ENDS.match(piece) is not None)
        return cls(number, [text.strip() for text in texts], words.special, words.symbols)


def _is_closing(piece: str, before: str) -> bool:
    """Tells whether a piece ends what went ``before`` it: a bracket, one more full stop, a quote that is open there."""
    if piece.strip() in ('"', "'"):
        return before.count(piece.strip()) % 2 == 1
    return _CLOSES.fullmatch(piece) is not None


def _is_decimal(pieces: Sequence[str]) -> bool:
    """Tells whether three pieces are a number with a point in it, whose tokenizer tells no spaces."""
    return len(pieces) == 3 and pieces[0][-1:].isdigit() and pieces[1] == "." and pieces[2].strip()[:1].isdigit()


def mark_of(tokens: Iterable[str]) -> str | None:
    """Returns the mark that most of the tokens bear: ``##``, ``Ġ``, ``▁``, ``</w>``, ``@@``. None: none has any."""
    counts = dict.fromkeys(MARKS, 0)
    for token in tokens:
        for mark, bears in MARKS.items():
            counts[mark] += bears(token)
    most = max(counts, key=counts.__getitem__)
    return most if counts[most] else None


def spell_tokens(tokens: Sequence[str]) -> list[str]:
    """Returns what each token adds to the running text, with the space before it; joined, that is the text.

    Tokenizers that mark where words begin tell the spaces. Elsewhere there is one before a word, but for the first, and
    none before punctuation that closes nor after a bracket or quote that opens. A token that is a part of a character
    is spelled as the tokenizer writes it.
    """
    mark = mark_of(tokens)
    found = Words.from_tokens(tokens, mark)
    texts: list[str] = []
    open_end = True
    for at, token in enumerate(tokens):
        piece = _read_piece(token, None if found.special[at] else mark)
        try:
            text = piece.decode()
        except UnicodeDecodeError:
            text = token.replace("Ġ", " ")
        if mark not in ("Ġ", "▁") or found.special[at]:
            goes_on = at > 0 and found.number[at] == found.number[at - 1]
            text = text if open_end or goes_on or _CLOSES.fullmatch(text) else f" {text}"
        texts.append(text)
        open_end = text[-1:] in set("([{\u201c\u2018\n")
    return texts


def _begins_word(token: str, before: str, piece: bytes, mark: str | None) -> bool:
    """Tells whether a word begins with ``token``, by its marks alone."""
    if mark == "##":
        return not token.startswith(mark)
    if mark in ("</w>", "@@"):
        return before.endswith(mark) == (mark == "</w>")
    return mark is None or piece[:1].isspace()


def _read_piece(token: str, mark: str | None) -> bytes:
    """Returns what a token adds to the text. Some tokens are parts of a character."""
    byte = _BYTE.fullmatch(token)
    if byte:
        return bytes([int(byte[1], 16)])
    if mark == "Ġ":
        alphabet = _byte_alphabet()
        return b"".join(alphabet.get(letter) or letter.encode("utf-8", "replace") for letter in token)
    if mark == "▁":
        token = token.replace(mark, " ")
    elif mark == "##":
        token = token.removeprefix(mark)
    elif mark is not None:
        token = token.removesuffix(mark)
    return token.encode("utf-8", "replace")


@functools.cache
def _byte_alphabet() -> dict[str, bytes]:
    """Returns GPT-2's letters for the 256 bytes: those that print are themselves, the others count on from 256."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): bytes([byte]) for byte in plain}
    return letters | {chr(256 + number): bytes([byte]) for number, byte in enumerate(others)}


def _has_only_symbols(piece: bytes) -> bool:
    """Tells whether there is no letter and no digit. What is not a whole character may be part of one."""
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return False
    return not any(unicodedata.category(letter)[0] in "LMN" for letter in text)
