"""One drawing of both kinds of layers, with the names of scopes where they are: for pages and for the documentation."""

from __future__ import annotations

from collections.abc import Iterator

from ..selection import describe_scope

__all__ = ["LAYERS", "draw_layers"]

LAYERS: dict[str, tuple[tuple[str, str], ...]] = {
    "norms after (post-LN: BERT, RoBERTa)": (
        ("attention", "attn"),
        ("+", "attn_res"),
        ("norm", "atb"),
        ("feed-forward", "atb_ff"),
        ("+", "atb_ff_res"),
        ("norm", "atb_ff_res_ln"),
    ),
    "norms before (pre-LN: GPT-2, Llama)": (
        ("norm", ""),
        ("attention", "attn"),
        ("+", "atb"),
        ("norm", "atb_ln"),
        ("feed-forward", "atb_ln_ff"),
        ("+", "atb_ln_ff_res"),
    ),
}
"""The parts of a layer in order, each with the scope that ends behind it."""

_WIDTH, _HIGH, _BOX, _STEP = 870, 118, 94, 138


def draw_layers() -> str:
    """Returns the drawing as SVG, in the colour of the text around it, and of any width.

    >>> from ffattr.report.drawing import draw_layers
    >>> draw_layers().count("<title>attention block + FF</title>")
    1
    """
    rows = "".join(
        f'<g transform="translate(0 {place * _HIGH})">{"".join(_draw_layer(name, parts))}</g>'
        for place, (name, parts) in enumerate(LAYERS.items())
    )
    size = f'viewBox="0 0 {_WIDTH} {_HIGH * len(LAYERS)}"'
    look = 'fill="none" stroke="currentColor" font-family="sans-serif" font-size="13"'
    return f'<svg {size} role="img" aria-label="Where the scopes of a layer are" {look}>{rows}</svg>'


def _draw_layer(name: str, parts: tuple[tuple[str, str], ...]) -> Iterator[str]:
    yield _write(8, 16, name, "start", 'font-weight="600"')
    line = 66
    yield f'<path d="M8 {line}H{_WIDTH - 8}m-7 -4l7 4l-7 4"/>'
    fork = 16  # where what bypasses a block leaves
    for place, (part, scope) in enumerate(parts):
        x = 30 + place * _STEP
        if part == "+":
            yield f'<path d="M{fork} {line}V{line - 34}H{x + 12}V{line - 12}m-4 -6l4 6l4 -6"/>'
            yield f'<circle cx="{x + 12}" cy="{line}" r="11" fill="var(--card, #fff)"/>{_write(x + 12, line + 5, part)}'
            end = x + 24
        else:
            yield f'<rect x="{x}" y="{line - 16}" width="{_BOX}" height="32" rx="7" fill="var(--card, #fff)"/>'
            yield _write(x + _BOX / 2, line + 4.5, part)
            end = x + _BOX
        following = parts[place + 1][0] if place + 1 < len(parts) else ""
        if scope in ("atb", "atb_ff_res_ln") or (scope == "atb_ln_ff_res" and not following):
            fork = end + 8
        if scope:
            middle = x + 12 if part == "+" else x + _BOX / 2
            label = _write(middle, line + 37, scope, "middle", 'font-family="monospace" font-size="12.5"')
            yield f"<g><title>{describe_scope(scope)}</title>{label}</g>"


def _write(x: float, y: float, text: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="currentColor" stroke="none" {more}>{text}</text>'
