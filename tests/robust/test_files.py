"""Saved files with anything done to them: a `FileFormatError`, or what was saved."""

from __future__ import annotations

import functools
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import hypothesis
import matplotlib.pyplot as plt
import pytest
import torch
from hostile import examples, judge, odd
from hypothesis import strategies as st
from keeping import kept, some
from made_contributions import contributions
from synthetic import attribution

import ffattr
from ffattr import Pool, StackedAttribution, TopK
from ffattr.errors import FileFormatError


@functools.cache
def made() -> dict[str, Any]:
    small = attribution(("atb", "atb_ff"), tokens=4, real=(4, 2))
    return {
        "maps": small,
        "heads": attribution(("attn_heads", "atb"), tokens=3, real=(3,)),
        "top": kept(TopK(2), some(("atb",), tokens=4, real=((0, 1, 3),))),
        "pool": kept(Pool(2), some(("atb",), tokens=4, real=((0, 1, 3),))),
        "stacked": StackedAttribution.of({"encoder": small, "decoder": small}),
        "contributions": contributions(tokens=3, real=(3, 2), encoder=True),
    }


@functools.cache
def saved(folder: Path) -> dict[str, bytes]:
    found = {}
    for name, result in made().items():
        result.save(folder / "saved")
        found[name] = (folder / "saved").read_bytes()
    return found


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join(header: dict[str, Any], numbers: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


@st.composite
def damaged(draw: Any, folder: Path) -> tuple[str, bytes]:
    """A file in which bytes were changed, lost, added, doubled or moved."""
    name = draw(st.sampled_from(sorted(made())))
    content = bytearray(saved(folder)[name])
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        span = draw(st.integers(1, 64))
        how = draw(st.sampled_from(["flip", "flip in the header", "cut", "end", "zero", "double", "insert"]))
        if how.startswith("flip"):
            at = at % 600 if how.endswith("header") else at
            content[at : at + 1] = bytes([content[at] ^ draw(st.integers(1, 255))]) if at < len(content) else b""
        elif how == "cut":
            del content[at : at + span]
        elif how == "end":
            del content[at:]
        elif how == "zero":
            content[at : at + span] = bytes(len(content[at : at + span]))
        elif how == "double":
            content[at:at] = content[at : at + span]
        else:
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
    return name, bytes(content)


@st.composite
def forged(draw: Any, folder: Path) -> tuple[str, bytes]:
    """A file without a checksum, as older versions wrote them, whose description or header says something else."""
    name = draw(st.sampled_from(sorted(made())))
    header, numbers = split(saved(folder)[name])
    metadata = header["__metadata__"]
    del metadata["checksum"]
    content = json.loads(metadata["attribution"])
    plain = odd.filter(lambda value: _is_json(value))
    for _ in range(draw(st.integers(1, 2))):
        part: Any = content
        if draw(st.booleans()):
            key = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
            field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            known = {
                "dtype": st.sampled_from(["F64", "F32", "I64", "BOOL", "F16", "U8", "F4", "X"]),
                "shape": st.lists(st.integers(-1, 7), max_size=5),
                "data_offsets": st.lists(st.integers(0, 500), max_size=3),
            }
            header[key][field] = draw(known[field])
            continue
        for _ in range(draw(st.integers(1, 3))):
            if isinstance(part, dict) and part:
                key = draw(st.sampled_from(sorted(part)))
            elif isinstance(part, list) and part:
                key = draw(st.integers(0, len(part) - 1))
            else:
                break
            if draw(st.booleans()) or not isinstance(part[key], (dict, list)):
                part[key] = draw(plain)
                break
            part = part[key]
    metadata["attribution"] = json.dumps(content)
    return name, join(header, numbers)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def same(found: Any, expected: Any) -> bool:
    if type(found) is not type(expected) or repr(found) != repr(expected):
        return False
    mine, theirs = found.to_pandas(), expected.to_pandas()
    return bool(mine.equals(theirs))


def show(result: Any, path: Path) -> None:
    """Looks at a result in every way."""
    result.to_pandas()
    result.top(3)
    result.to_words()
    result.to_html(path)
    result._repr_html_()
    result.plot()
    result.save(path)
    plt.close("all")


@pytest.mark.parametrize("how", [damaged, forged])
def test_a_file_is_what_was_saved_or_refused(tmp_path: Path, how: Any) -> None:
    path, shown = tmp_path / "file", tmp_path / "shown"
    shown.mkdir()

    @hypothesis.given(how(tmp_path))
    @examples(250)
    def attack(drawn: tuple[str, bytes]) -> None:
        name, content = drawn
        path.write_bytes(content)
        if how is damaged:
            judge("files", lambda: ffattr.load(path), lambda found: same(found, made()[name]))
            return
        loaded: list[Any] = []
        judge("files", lambda: loaded.append(ffattr.load(path)))
        if loaded:
            judge("files", lambda: show(loaded[0], shown / "page"))

    attack()
    shutil.rmtree(shown)


@hypothesis.given(odd)
@examples(60)
def test_what_is_no_path(value: Any) -> None:
    judge("files", lambda: ffattr.load(value))


def test_every_error_of_a_damaged_file_is_of_one_kind(tmp_path: Path) -> None:
    path = tmp_path / "file"

    @hypothesis.given(damaged(tmp_path))
    @examples(60)
    def attack(drawn: tuple[str, bytes]) -> None:
        path.write_bytes(drawn[1])
        try:
            found = ffattr.load(path)
        except FileFormatError:
            return
        assert same(found, made()[drawn[0]])

    attack()
    assert torch.is_grad_enabled()
