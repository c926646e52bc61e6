"""A page of two panels, what it holds, and what a browser shows of it."""

import io

import torch
from browser import drawn

from ffattr.report import Panel, render

HOSTILE = '<img src=x onerror="window.flag=1">'
WORDS = ["[CLS]", "the", "cat", "un", "##believ", "##ably", "sat", ",", HOSTILE, "</script>", "mat", "[SEP]"]
T = len(WORDS)
SCOPES = ["attn_heads", "atb", "atb_ff"]


def make_values(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5).exp()


MAPS = {
    "attn_heads": make_values(3, 2, T, T, seed=0),
    "atb": make_values(3, T, T, seed=1),
    "atb_ff": make_values(3, T, T, seed=2) * (torch.rand(T, T, generator=torch.Generator().manual_seed(3)) > 0.1),
}
CROSS = make_values(1, 4, 6, seed=4)
CHANGES = [
    (layer, name, 0.1 * (layer + place + 1)) for layer in range(3) for place, name in enumerate(["FF", "RES", "LN"])
]
ACCURACY = 0.0002
ANGLES = [(2, "own", 0.4, 0.1), (2, "others", -0.42, 1.0), (4, "others", -0.2, 0.75), (7, "others", 0.05, 0.25)]
PLAIN = "layer=7&scope=atb_ff"
"""One map, no comparison and no selection."""


def make_panels():
    """Returns maps of one text, and from another text to it."""
    own = Panel(
        "1: the cat",
        WORDS,
        range(T),
        WORDS,
        range(T),
        True,
        [2, 4, 7],
        SCOPES,
        lambda scope, place: MAPS[scope][place],
        {"attn_heads": ["head 0", "head 1"]},
        [([2, 4, 7][layer], name, value) for layer, name, value in CHANGES],
        angles=ANGLES,
    )
    text = ["Ġalpha", "Ċ", "Ġbeta", "Ġgam", "ma", "ĠcafÃ©"]
    cross = Panel("cross", ["▁a", "▁b", "c", "▁d"], [3, 4, 5, 6], text, range(6), False, [0], ["atb"], read_cross)
    return [own, cross]


def read_cross(scope, place):
    return CROSS[place]


def write_page(path, panels, title="A title", **options):
    path.write_text("".join(render(panels, title, **options)), encoding="utf-8")
    return path


def make_square(values):
    tokens = [f"Ġw{place}" for place in range(len(values))]
    places = range(len(values))
    return Panel("1", tokens, places, tokens, places, True, [0], ["atb"], lambda scope, place: values)


def read_said(tab):
    """Row, column and value that the line below the map is about."""
    row, column, value = (tab.locator("#readout").get_attribute(f"data-{name}") for name in ("row", "column", "value"))
    return (int(row), int(column), float(value)) if row and column else None


def find_box(tab):
    return tab.locator("#over").bounding_box()


def point(tab, across, down):
    """Moves the pointer to a place of the map between 0 and 1 on each side."""
    box = find_box(tab)
    tab.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"])


def press(tab, keys):
    for key in keys.split():
        tab.keyboard.press(key)
    drawn(tab)


def read_shades(tab, pane):
    return tab.eval_on_selector_all(
        f"#{pane} .word", "words => words.map(word => Number(word.style.getPropertyValue('--t') || 0))"
    )


def find_strength(values):
    """Of every token of the running text: two decades below the largest, on a logarithmic scale."""
    part = values.abs() / values.abs().max()
    return (1 + part.clamp_min(1e-30).log10() / 2).clamp(0, 1)


def find_share(scope, place, *part):
    values = MAPS[scope][place][part] if part else MAPS[scope][place]
    return values / values.sum(1, keepdim=True)


def read_pixels(tab):
    """The map as it is seen: RGB of every pixel of the stage."""
    from PIL import Image

    image = Image.open(io.BytesIO(tab.screenshot(clip=find_box(tab)))).convert("RGB")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3).int()
