"""Parts of any batches are joined in the order of rows and windows."""

import pandas as pd
import torch

from ffattr.corpus.pieces import Parts, PieceNumbers, join_parts


def part(row, window, ranks):
    numbers = PieceNumbers(row, window, 3, 0.0, {}, 6, {})
    frame = pd.DataFrame({"row": row, "window": window, "rank": ranks})
    return Parts([numbers], {"pairs": frame}, {f"{row}.{window}.atb": torch.ones(1)})


def test_joined_parts_are_in_the_order_of_rows():
    joined = join_parts([part(9, 0, [1, 2]), part(2, 1, [1]), part(2, 0, [2, 1])])
    assert [(piece.row, piece.window) for piece in joined.pieces] == [(2, 0), (2, 1), (9, 0)]
    assert joined.frames["pairs"].values.tolist() == [[2, 0, 2], [2, 0, 1], [2, 1, 1], [9, 0, 1], [9, 0, 2]]
    assert sorted(joined.maps) == ["2.0.atb", "2.1.atb", "9.0.atb"]
    assert join_parts([]) == Parts()
