"""What the tables of a study say of its texts: file, line, identifier, the text itself, and why one was left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas

__all__ = ["OnError", "Origin", "Refused", "pick_texts", "tell_origins"]

OnError = Literal["raise", "skip"]
_LONGEST = 200  # characters of a text in a table


@dataclass(frozen=True)
class Origin:
    """Says where a text comes from: its ``line``, from 1, in the file ``source``, and its ``id`` there, where it has
    any of these."""

    text: str
    line: int | None = None
    source: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class Refused:
    """Says why there is nothing of a text."""

    origin: Origin
    kind: str
    message: str


def pick_texts(
    name: str, texts: Sequence[str], tokenizer: Any, most: int | None, on_error: OnError
) -> tuple[list[Origin], list[Refused]]:
    """Returns the texts that can be read by a model of ``most`` positions (None: any number), and the others.

    Raises ValueError for the first of the others unless they are to be skipped, and where no text is left.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}, expected 'raise' or 'skip'")
    if not texts:
        raise ValueError("the corpus has no text")
    good: list[Origin] = []
    refused: list[Refused] = []
    for number, text in enumerate(texts):
        origin = Origin(text, number + 1)
        why = _find_fault(name, origin, tokenizer, most)
        if why is None:
            good.append(origin)
        elif on_error == "raise":
            raise ValueError(f"{why[1]}, or say on_error='skip'")
        else:
            refused.append(Refused(origin, *why))
    if not good:
        raise ValueError(f"none of {len(texts)} texts can be read, the first of them: {refused[0].message}")
    return good, refused


def _find_fault(name: str, origin: Origin, tokenizer: Any, most: int | None) -> tuple[str, str] | None:
    said = f"text {origin.line}"
    if not origin.text.strip():
        return "EmptyText", f"{said} is empty: leave it out"
    tokens = len(tokenizer(origin.text)["input_ids"]) if most is not None else 0
    if most is not None and tokens > most:
        cut = f"{said} ({origin.text[:40]!r}...) has {tokens} tokens, but {name} has {most} learned positions"
        return "TooLong", f"{cut}: cut it into shorter ones"
    return None


def tell_origins(frame: pandas.DataFrame, origins: Sequence[Origin], *, first: int = 0) -> pandas.DataFrame:
    """Returns the frame with what is known of each row's text after its column ``batch``, which numbers ``origins``
    from ``first`` on. Frames without that column stay as they are."""
    if "batch" not in frame:
        return frame
    found = frame.copy()
    place = list(found).index("batch") + 1
    columns: dict[str, Callable[[Origin], Any]] = {
        "source": lambda origin: origin.source,
        "line": lambda origin: origin.line,
        "id": lambda origin: origin.id,
        "text": lambda origin: shorten_text(origin.text),
    }
    for name, read in reversed(columns.items()):
        if any(read(origin) is not None for origin in origins):
            found.insert(place, name, [read(origins[batch - first]) for batch in found["batch"]])
    return found


def shorten_text(text: str) -> str:
    """Returns a text on one line, and of a long one its beginning."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"
