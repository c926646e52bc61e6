"""Real English text, out of copyright: the beginning of Jane Austen's Pride and Prejudice (1813), a sentence or so on
each line; and of the King James Bible the books of Ruth and Jonah and the first chapter of Esther, verse by verse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models import Loaded

__all__ = ["CORPUS", "SENTENCES", "prose", "running"]

_HERE = Path(__file__).parent

SENTENCES = (_HERE / "prose.txt").read_text().splitlines()
CORPUS = SENTENCES + (_HERE / "verses.txt").read_text().splitlines()


def running(sentences: int | None = None) -> str:
    """The first ``sentences`` of the novel (None: all) as running text."""
    return " ".join(SENTENCES[:sentences])


def prose(loaded: Loaded, tokens: int = 128) -> dict[str, Any]:
    """A model's input of the first ``tokens`` tokens of the novel, those that its tokenizer adds included."""
    inputs = loaded.tokenizer(running(), return_tensors="pt", truncation=True, max_length=tokens)
    if inputs["input_ids"].shape[1] < tokens:
        raise ValueError(f"the text has {inputs['input_ids'].shape[1]} tokens, expected at least {tokens}")
    return dict(inputs)
