"""Which words made the model say this one? SmolLM2 finishes sentences, and what each word gave is told and drawn.

The scores of the words, and of what comes from none, add up to the logit: to the difference of two, where the
question is why one word rather than another. Through the layers the same sum moves from the words that know to the
word that is read.
Run: ``python benchmarks/examples/why_this_word.py [picture.png [page.html]]``
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))
from models import smollm2

import ffattr

QUESTIONS = [
    ("The Eiffel Tower is in the city of", " Paris", " London"),
    ("The keys to the old cabinet", " are", " is"),
    ("Mary gave the book to John because", " he", " she"),
]
DRAWN = 0
"""The question of the picture and the page."""


def main() -> None:
    model, tokenizer = smollm2(head=True)
    for number, (text, word, other) in enumerate(QUESTIONS):
        found = ffattr.contributions(model, text, target=(word, other), tokenizer=tokenizer, flow=number == DRAWN)
        words = found.to_words()
        print(f"\n{text}{word}, and not{other}: ahead by {float(found.value):.2f}")
        for row in words.top(4).itertuples():
            print(f"  {row.token:10s} {row.score:+.2f}")
        total = float(words.scores[0, 0].sum() + words.bias[0, 0])
        print(f"  all words and the bias: {total:.2f}")
        if number != DRAWN:
            continue
        flow = words.flow
        assert flow is not None
        between = flow[0, :, 0].clone()
        between.diagonal(dim1=-2, dim2=-1).zero_()
        layer, to, of = (int(at) for at in (between == between.max()).nonzero()[0])
        names = words.tokens[0]
        print(f"  most passes in layer {layer}: {float(between.max()):+.2f} from {names[of]!r} to {names[to]!r}")
        if sys.argv[1:]:
            words.plot().savefig(sys.argv[1], dpi=130)
        if sys.argv[2:]:
            found.to_html(sys.argv[2], title=f"{text} …")


if __name__ == "__main__":
    main()
