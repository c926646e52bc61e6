"""ffattr on a plain ``nn.TransformerEncoder``, trained for a few seconds on a task whose answer is known.

Every sequence is a question token and ten symbols, one of them marked; the question has to come out as the marked
symbol. So whatever the question reads, it must read the marked token, and the maps should show it: before the
feed-forward block (``atb``) and after it. Run: ``python benchmarks/examples/encoder_layer.py``
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ffattr

SYMBOLS, LENGTH, WIDTH = 8, 10, 32
SCOPES = {"atb": "attention block", "atb_ff": "+ feed-forward", "atb_ff_res_ln": "whole layer"}


class Lookup(nn.Module):
    """Embeddings and a head of one's own around PyTorch's encoder; ffattr only needs the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.symbol = nn.Embedding(SYMBOLS + 1, WIDTH)  # the last one is the question
        self.marked = nn.Embedding(2, WIDTH)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 64, 0.0, "gelu", batch_first=True), 1)
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def embed(self, symbols: Tensor, place: Tensor) -> Tensor:
        """``symbols`` ``[B, LENGTH]``, ``place`` ``[B]`` of the marked one: the encoder's input ``[B, 11, d]``."""
        ids = torch.cat([torch.full((len(symbols), 1), SYMBOLS), symbols], 1)
        embedded: Tensor = self.symbol(ids) + self.marked(nn.functional.one_hot(place + 1, 1 + LENGTH))
        return embedded

    def forward(self, symbols: Tensor, place: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embed(symbols, place))[:, 0])
        return logits


def examples(count: int) -> tuple[Tensor, Tensor, Tensor]:
    symbols, place = torch.randint(SYMBOLS, (count, LENGTH)), torch.randint(LENGTH, (count,))
    return symbols, place, symbols.gather(1, place[:, None])[:, 0]


def train(model: Lookup, steps: int = 200) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        symbols, place, answer = examples(128)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(symbols, place), answer).backward()
        optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    model = Lookup()
    train(model)
    model.eval()
    symbols, place, answer = examples(200)
    print(f"answers right: {int((model(symbols, place).argmax(-1) == answer).sum())} of {len(answer)}")

    # The row of the question alone; [:, 1:] leaves out what it keeps of itself.
    attr = ffattr.attribute(model.encoder, model.embed(symbols, place), scopes=list(SCOPES), queries=[0])
    print(f"layer reproduced to {float(attr.error.max()):.0e}")
    rows = {name: attr[scope][0, :, 0, 1:] for scope, name in SCOPES.items()}  # [B, LENGTH]
    for name, row in rows.items():
        found = int((row.argmax(-1) == place).sum())
        share = (row.gather(1, place[:, None])[:, 0] / row.sum(-1)).mean()
        print(f"{name:16s} the marked token is read most in {found} of {len(place)}, its mean share is {share:.2f}")

    first = [f"{symbol}{'*' * (n == place[0])}".ljust(5) for n, symbol in enumerate(symbols[0].tolist())]
    print(f"\n{'one of them, * is marked':24s} {'  '.join(first)}")
    for name, row in rows.items():
        print(f"{name:24s} {'  '.join(f'{float(share):.3f}' for share in row[0] / row[0].sum())}")


if __name__ == "__main__":
    main()
