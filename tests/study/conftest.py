"""A small model and all that is found of a few texts with it, found once."""

import documented
import pytest

from ffattr import study


@pytest.fixture(scope="session")
def texts():
    return ["The cat sat on the mat.", "Dogs barking.", "A bird saw two dogs, and the cat sat."]


@pytest.fixture(scope="session")
def tiny():
    """Model and tokenizer."""
    return documented.namespace()["model"], documented.namespace()["tokenizer"]


@pytest.fixture(scope="session")
def corpus(tiny, texts):
    """What `study.of_model` finds, in all texts and by vectors in two of them."""
    return study.of_model("tiny", tiny[0], texts, tiny[1], k=7, detailed=2)
