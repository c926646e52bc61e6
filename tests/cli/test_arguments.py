"""What the texts of options stand for."""

import pytest
import torch

from ffattr.cli.arguments import parse_dtype, parse_ig, parse_keep, parse_layers, read_text
from ffattr.decomposition.integrated_gradients import GaussLegendre, Riemann
from ffattr.results.keep import Pool, TopK


def test_text_is_read_as_it_is(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes("\ufeff Grüße,\n Welt \n".encode())
    assert read_text(" the cat ", None) == " the cat "
    assert read_text(None, file) == " Grüße,\n Welt \n"


def test_no_text_and_two_of_them(tmp_path):
    for given in (None, "text"):
        with pytest.raises(ValueError, match=f"^give either TEXT or --file FILE{', not both' if given else ''}$"):
            read_text(given, tmp_path / "file" if given else None)
    (tmp_path / "file").write_text(" \n\t")
    for given, file in ((" \n", None), ("", None), (None, tmp_path / "file")):
        with pytest.raises(ValueError, match="the text is empty"):
            read_text(given, file)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin").write_bytes("Gru\u00df".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin' is not UTF-8 text \(unexpected end of data at byte 3\)"):
        read_text(None, tmp_path / "latin")
    with pytest.raises(OSError, match=r"cannot read '.*nowhere': No such file or directory"):
        read_text(None, tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"cannot read '.*': Is a directory"):
        read_text(None, tmp_path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ("3", [3]),
        ("0, 3,-1", [0, 3, -1]),
        ("0:4", slice(0, 4)),
        (":-1", slice(None, -1)),
        (" 2 : ", slice(2, None)),
        (":", slice(None)),
    ],
)
def test_layers(given, expected):
    assert parse_layers(given) == expected


@pytest.mark.parametrize("given", ["", "all", "1,", "1.0", "0:4:2", "0:x", "1,2:3"])
def test_layers_that_are_none(given):
    with pytest.raises(ValueError, match=f'--layers {given!r}: expected numbers "0,3,-1" or a slice "0:4"'):
        parse_layers(given)


def test_integrated_gradients():
    assert parse_ig("exact") == "exact"
    assert parse_ig("riemann:7") == Riemann(7)
    assert parse_ig("riemann:7:left") == Riemann(7, "left")
    assert parse_ig("gauss:16") == GaussLegendre(16)


@pytest.mark.parametrize("given", ["", "Exact", "riemann", "riemann:", "riemann:-3", "riemann:1:left:x", "gauss:4:x"])
def test_integrated_gradients_of_no_rule(given):
    with pytest.raises(ValueError, match=f"--ig '{given}': expected exact, riemann:STEPS"):
        parse_ig(given)


def test_dtypes_by_name():
    assert parse_dtype(None) is None
    assert parse_dtype("bfloat16") is torch.bfloat16
    assert parse_dtype("float8_e4m3fn") is torch.float8_e4m3fn
    for given in ("float31", "nn", "tensor", "torch.float32", ""):
        with pytest.raises(ValueError, match=f"--dtype '{given}': expected one of float64, float32, bfloat16"):
            parse_dtype(given)


def test_what_is_kept():
    assert parse_keep(None, None) == "dense"
    assert parse_keep(3, None) == TopK(3)
    assert parse_keep(None, 4) == Pool(4)
    with pytest.raises(ValueError, match="--top 0 and --pool 0 are both given"):
        parse_keep(0, 0)
    with pytest.raises(ValueError, match="--top 0: expected at least 1"):
        parse_keep(0, None)
    with pytest.raises(ValueError, match="--pool -3: expected at least 1"):
        parse_keep(None, -3)
