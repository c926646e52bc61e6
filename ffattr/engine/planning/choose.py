"""Which method a layer's map is computed by, and in which blocks.

Where the counts of two methods come near each other, this machine's rates decide: those of ``ffattr bench --calibrate``
if it was run here, and otherwise short runs of both. The former also predict times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...decomposition.sketch import Sketch
from ...ops.availability import describe_product
from ...ops.backends import Backend
from ..machine_rates import Rates, calibrated, measured
from .costs import BY_QUERY, Blocks, LayerShape, Method
from .plan import EngineOptions, LayerPlan
from .rotation import PAYS, count_operations

__all__ = ["SAMPLED", "group_into_packs", "plan_layer"]

_ENOUGH = 96  # queries of a block: features of the keys are then a few per cent of the direct method's work
SAMPLED = 4096
"""Pairs that are computed exactly for a sketch: with half as many the rank correlation suffers."""
_METHODS: dict[str, Method] = {"direct": "direct", "operator": "operator", "mixed": "mixed", "pairs": "pairs"}
_MIXED_SAVES = 1.3
"""How many times fewer operations than the operator method's make up for what the mixed one is slower at: with 2 times
fewer it was 1.5 to 1.9 times as fast, with 1.6 times 1.3 to 1.5, with as many 0.8 to 1.1 (`bench_exact.py`)."""
_NEAR = 2.0  # counts further apart than this decide by themselves: no machine's rates differ by more
_FEW = 0.7  # single pairs have to take so much less: what the others prepare of weights alone is kept for later calls


def plan_layer(layer: int, shape: LayerShape, ff_scopes: int, options: EngineOptions) -> LayerPlan:
    """Chooses the method and the blocks of one layer, of which ``ff_scopes`` scopes take feed-forward work for every
    pair. Raises ValueError where the memory cannot hold a single pair.
    """
    useful, most = options.budget
    backend, dtype, method = options.backend, options.matmul_dtype, options.method
    sketch, why = None, ""
    if isinstance(method, Sketch):
        sketch, why = _choose_sketch(shape, ff_scopes, backend, method)
        method = "auto"
        if sketch is not None:
            shape = replace(shape, sketched=(sketch.width,) * ff_scopes)
    chosen, choice = _choose_method(shape, ff_scopes, method, options)
    if chosen in ("direct", "operator") and not shape.sketched and ff_scopes:
        shape = _rotate_shape(shape, chosen)
        why += f"; rotated: {shape.zeros / (shape.ff_width * shape.width):.0%} of the product is zero" * shape.rotated
    choice += why
    if options.memory_budget is None and chosen != "reference":
        useful = min(most, max(useful, _worthwhile_bytes(shape, chosen, dtype)))
    if chosen == "reference":
        per_query = shape.bytes(chosen, Blocks(1, shape.tokens, shape.tokens), dtype)
        blocks = Blocks(max(1, min(shape.queries, useful // per_query)), shape.tokens, shape.tokens)
        return LayerPlan(layer, shape, chosen, blocks, dtype, choice)
    rates = calibrated(backend.name, dtype, options.device, torch.get_num_threads())
    while chosen in BY_QUERY and _least_bytes(shape, chosen, dtype) > most and method == "auto":
        choice = f"{chosen} would not fit the memory"
        chosen = "operator" if chosen == "mixed" else "direct"
    least = _least_bytes(shape, chosen, dtype)
    if least > most:
        raise ValueError(
            f"memory_budget={options.memory_budget} bytes is too small for layer {layer} ({chosen}, {shape.tokens} "
            f"tokens): expected at least {least}"
        )
    blocks = _fit_blocks(shape, chosen, max(useful, least), dtype)
    return LayerPlan(layer, shape, chosen, blocks, dtype, choice, sketch=sketch, rates=rates)


def _rotate_shape(shape: LayerShape, chosen: Method) -> LayerShape:
    """The shape as it is or, where that pays, with the width rotated."""
    rotated = replace(shape, rotated=shape.rotatable)
    saved = shape.flops(chosen) - rotated.flops(chosen)
    return rotated if saved > PAYS * count_operations(shape.ff_width, shape.width) else shape


def _choose_sketch(shape: LayerShape, ff_scopes: int, backend: Backend, sketch: Sketch) -> tuple[Sketch | None, str]:
    """The sketch, if it saves anything, and a word on it."""
    if not ff_scopes or backend.is_reference or shape.by_expert:
        return None, "; exact: no sketch of this" * bool(ff_scopes)
    if sketch.tolerance is None and ff_scopes * sketch.width >= shape.width:
        return None, f"; exact: {ff_scopes} sketches of {sketch.width} are no narrower than {shape.width}"
    if shape.pairs < 4 * SAMPLED:  # each is twice the work of a pair of the map
        return None, f"; exact: a sketch needs {SAMPLED} of the {shape.pairs} pairs to begin with"
    return sketch, f"; sketched to {sketch.width} of {shape.width}"


def group_into_packs(shapes: Sequence[LayerShape], ff_scopes: int, options: EngineOptions) -> list[list[int]]:
    """Which sequences, by their places in ``shapes``, are worked on together: short ones of about the same length, as
    many as fit into the working memory at once. A long one, and each for the reference, is alone."""
    useful, _ = options.budget
    dtype = options.matmul_dtype
    by_query = next((method for method in BY_QUERY if method == options.method), None)
    kind: Method = "attention" if not ff_scopes else by_query or "direct"
    found: list[list[int]] = []
    for place in sorted(range(len(shapes)), key=lambda place: -shapes[place].tokens):
        together = [*found[-1], place] if found else [place]
        joined = LayerShape.join([shapes[one] for one in together])
        whole = Blocks(joined.queries, joined.tokens, joined.tokens)
        short = joined.longest < joined.width and not options.backend.is_reference
        if found and short and joined.bytes(kind, whole, dtype) - joined.fixed_bytes(kind, dtype) <= useful:
            found[-1].append(place)
        else:
            found.append([place])
    return found


def _worthwhile_bytes(shape: LayerShape, chosen: Method, dtype: torch.dtype) -> int:
    """Bytes without which long sequences would be cut into such short blocks of queries that what is made of the keys
    for every block costs as much as the maps."""
    passing, kept = shape.query_bytes(chosen, dtype)
    queries, keys = min(shape.queries, _ENOUGH), shape.tokens if chosen in BY_QUERY else 1
    pairs = keys * shape.pair_bytes(chosen, dtype, cut=False)
    return keys * shape.key_bytes(chosen, dtype) + queries * max(passing, 2 * (kept + pairs))


def _fit_blocks(shape: LayerShape, chosen: Method, useful: int, dtype: torch.dtype) -> Blocks:
    """The longest blocks that ``useful`` bytes hold."""
    if shape.sequences > 1:
        return Blocks(max(1, shape.queries), shape.tokens, shape.tokens)
    passing, kept = shape.query_bytes(chosen, dtype)
    pair = shape.pair_bytes(chosen, dtype, cut=chosen not in BY_QUERY)
    ff_keys = shape.tokens if chosen in BY_QUERY else 1
    spare = useful - ff_keys * shape.key_bytes(chosen, dtype)
    queries = max(1, min(shape.queries, useful // passing, spare // 2 // (kept + ff_keys * pair)))
    left = useful - queries * kept
    grams = shape.gram_bytes
    keep = bool(grams) and queries < shape.queries and grams < left // 2
    left -= grams * keep

    def count_keys(method: Method) -> int:
        per_pair = shape.pair_bytes(method, dtype)
        return max(1, min(shape.tokens, left // (shape.key_bytes(method, dtype) + queries * per_pair)))

    return Blocks(
        queries, count_keys("attention"), count_keys(chosen) if chosen in ("direct", "pairs") else ff_keys, keep
    )


def _least_bytes(shape: LayerShape, method: Method, dtype: torch.dtype) -> int:
    """Bytes that the smallest blocks need: one query with one key, or with all keys where the method needs them all."""
    passing, kept = shape.query_bytes(method, dtype)
    keys = shape.tokens if method in BY_QUERY else 1
    block = max(keys * shape.key_bytes(method, dtype), shape.key_bytes("attention", dtype))
    pair = max(shape.pair_bytes(kind, dtype) for kind in ("attention", method))
    return max(passing, kept + block + keys * pair)


def _choose_method(shape: LayerShape, ff_scopes: int, method: str, options: EngineOptions) -> tuple[Method, str]:
    """The method, and why it is this one."""
    backend, dtype, device = options.backend, options.matmul_dtype, options.device
    if method != "auto" and method not in _METHODS:
        raise ValueError(
            f"unknown method {method!r}, expected 'auto', 'direct', 'operator', 'mixed', 'pairs' or ffattr.Sketch(...)"
        )
    if backend.is_reference:
        return "reference", "the definition"
    if not ff_scopes:
        return "attention", "no scope takes d-wide work for a pair"
    if shape.grouped:
        return "direct", "the one method for groups of keys"
    if method == "pairs" and shape.by_expert:
        raise ValueError("method='pairs' does not tell experts apart, expected 'auto', 'direct', 'operator' or 'mixed'")
    if method in _METHODS:
        return _METHODS[method], "asked for"
    if dtype == torch.float8_e4m3fn:
        return "direct", "the only method in float8"
    known = calibrated(backend.name, dtype, device, torch.get_num_threads())
    emulated = backend.is_emulated(device)  # whose rates would say nothing, and take minutes
    # The mixed method's largest product is the library's, the operator method's one of the kernel.
    alike = device.type == "cpu" and not emulated and not describe_product(backend.name, dtype)
    by_query = _choose_by_query(shape, known, allow_mixed=alike)
    direct, other, pairs = (shape.flops(kind) for kind in ("direct", by_query, "pairs"))
    if pairs < _FEW * min(direct, other) and not shape.by_expert and not shape.sketched:
        return "pairs", f"{shape.pairs} pairs are too few to prepare anything for"
    ratio = direct / other
    if not 1 / _NEAR < ratio < _NEAR or emulated:
        chosen: Method = by_query if ratio > 1 else "direct"
        return chosen, f"{max(ratio, 1 / ratio):.1f}x fewer operations"
    if known is not None:
        seconds = [known.seconds(shape.work(kind)) for kind in ("direct", by_query)]
        chosen = by_query if seconds[0] > seconds[1] else "direct"
        return chosen, f"faster here: {seconds[0]:.2g} s direct, {seconds[1]:.2g} s {by_query}"
    rates = measured(backend.name, dtype, device, torch.get_num_threads())
    chosen = by_query if direct / rates[0] > other / rates[1] else "direct"
    return chosen, f"faster at {rates[0] / 1e9:.0f} direct, {rates[1] / 1e9:.0f} operator GFLOP/s measured here"


def _choose_by_query(shape: LayerShape, known: Rates | None, allow_mixed: bool) -> Method:
    """The faster of the methods that make a matrix for each query; without ``known`` rates by counts, and "mixed" only
    where ``allow_mixed`` says that these tell anything: on a GPU a query at a time is a handful of short kernels, and a
    matrix unit makes up for more operations than there are to save (`bench_exact.py`: 0.5 to 0.9 times as fast)."""
    if known is not None:
        return min(BY_QUERY, key=lambda method: known.seconds(shape.work(method)))
    fewer = shape.flops("operator") / shape.flops("mixed")
    return "mixed" if allow_mixed and fewer > _MIXED_SAVES else "operator"
