"""Panels to show, and what a page holds of them as a browser reads it."""

import base64
import json
import math
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import torch

from ffattr.report import Panel, Scores


def make_panel(values, tokens=None, **changed):
    """Of maps ``[layers, n, m]``, or ``[layers, parts, n, m]``."""
    n, m = values.shape[-2:]
    keys = tokens or [f"t{j}" for j in range(m)]
    panel = Panel(
        name="1: a panel",
        queries=keys[:n],
        query_positions=list(range(n)),
        keys=keys,
        key_positions=list(range(m)),
        same_tokens=True,
        layers=list(range(len(values))),
        scopes=["atb"],
        read=lambda scope, place: values[place],
        parts={"atb": [f"head {h}" for h in range(values.shape[1])]} if values.dim() == 4 else {},
    )
    return replace(panel, **changed)


def make_scored(given, flow=None, tokens=None, **changed):
    """Of scores ``[numbers, boundaries, m]``, and of flow ``[numbers, layers, m, m]``, with a bias of 0.25."""
    numbers, boundaries, m = given.shape
    keys = tokens or [f"t{j}" for j in range(m)]
    names = [f"number {k}" for k in range(numbers)]
    made = Scores(
        boundaries=[*(f"layer {layer}" for layer in range(boundaries - 1)), "output"],
        read=lambda scope: given[names.index(scope)],
        rest={name: {"bias": [0.25] * boundaries} for name in names},
        values={name: float(given[k, 0].sum()) + 0.25 for k, name in enumerate(names)},
        read_at=dict.fromkeys(names, m - 1),
    )
    panel = Panel(
        name="1: a text",
        queries=keys,
        query_positions=range(m),
        keys=keys,
        key_positions=range(m),
        same_tokens=True,
        layers=range(boundaries - 1),
        scopes=names,
        read=None if flow is None else lambda scope, place: flow[names.index(scope), place],
        signed=True,
        scores=made,
    )
    return replace(panel, **changed)


class Scripts(HTMLParser):
    """As a browser reads the page: its elements, and the text of each script by its id."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self._id = [], {}, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._id = dict(attrs).get("id", tag)

    def handle_data(self, data):
        self.texts[self._id] = self.texts.get(self._id, "") + data


def read_page(page):
    """What is in a page: its data, and a function from the entry of a map to its values and the sums of its rows."""
    scripts = Scripts(page)
    data = json.loads(scripts.texts["data"])

    def values(entry, columns):
        number, top, levels, above, *signed = entry
        sums, low, *high = (base64.b64decode(part) for part in scripts.texts[f"map-{number}"].strip().split("."))
        signs = np.unpackbits(np.frombuffer(zlib.decompress(high.pop()), np.uint8)) if signed else None
        codes = np.frombuffer(zlib.decompress(low), np.uint8).astype(np.int64)
        if high:
            codes += 256 * np.frombuffer(zlib.decompress(high[0]), np.uint8).astype(np.int64)
        codes = codes.reshape(-1, columns)
        codes = codes.cumsum(0) % (levels + 1) if above else codes
        shown = np.where(codes > 0, top * np.exp(data["step"] * (codes - levels)), 0)
        if signs is not None:
            shown = shown * (1 - 2.0 * signs[: shown.size].reshape(shown.shape))
        return torch.from_numpy(shown), torch.from_numpy(np.frombuffer(sums, "<f4").copy())

    return data, values


def is_within(shown, true, grid):
    """Whether every value is kept as exactly as the grid says, and zeros as zeros."""
    assert torch.equal(shown == 0, true == 0)
    floor = true.amax() * grid.floor
    ratio = (shown / true.clamp_min(floor)).double()[true > 0].log().abs()
    return ratio.numel() == 0 or float(ratio.max()) <= math.log1p(grid.accuracy) * (1 + 1e-6) + 1e-6


def spread_values(*shape, decades=3.0, seed=0):
    """Random values ``[shape]`` from 1 down so many powers of ten, a tenth of them zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = 10 ** (torch.rand(shape, generator=generator, dtype=torch.float64) * -decades)
    return values * (torch.rand(shape, generator=generator) > 0.1)
