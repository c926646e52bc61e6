"""Completions whose cause is in the context: the prompt, the next word that is asked for, its rival, and the words that
cause it. Written for this benchmark before any of it was run."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["PROMPTS", "Prompt"]


class Prompt(NamedTuple):
    """``cause``: any of these words is the cause of ``answer`` rather than ``rival``."""

    text: str
    answer: str
    rival: str
    cause: tuple[str, ...]


PROMPTS = (
    Prompt("Mary and John went to the store. John gave a drink to", " Mary", " John", ("Mary",)),
    Prompt("The keys that the old man lost yesterday", " were", " was", ("keys",)),
    Prompt("The key that the old men lost yesterday", " was", " were", ("key",)),
    Prompt(
        "Anna lives in Rome. Peter lives in Berlin. The city where Anna lives is", " Rome", " Berlin", ("Rome", "Anna")
    ),
    Prompt("The capital of France is the city of", " Paris", " London", ("France",)),
    Prompt("My favourite colour is blue. When I buy a shirt, I always choose", " blue", " red", ("blue",)),
    Prompt("The doctor took off her coat. Then", " she", " he", ("her",)),
    Prompt("The king took off his crown. Then", " he", " she", ("king", "his")),
    Prompt(
        "In the zoo we saw a lion, a tiger and a zebra. The animal with the stripes and hooves was the",
        " zebra",
        " lion",
        ("zebra", "stripes", "hooves"),
    ),
    Prompt("Monday, Tuesday, Wednesday,", " Thursday", " Friday", ("Wednesday",)),
)
