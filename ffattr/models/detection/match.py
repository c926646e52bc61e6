"""Which module plays which part in a layer, told by equal values among what its modules read and returned.

The value projection is the one whose output, mixed by the attention weights, is the input of another, and so on. All
tensors are ``[rows, width]``, one row per token, on the CPU in float32 or wider.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from torch import Tensor, nn

from .experts import match_experts
from .parts import Cut, Gate, Part, Product, StackedPart
from .probe import Undetected
from .refuse import (
    refuse_changed_heads,
    refuse_experts,
    refuse_networks_behind,
    refuse_norms_of_experts,
    refuse_norms_of_neurons,
)
from .rows import EQUAL, LayerRows
from .values import find_normed_values
from .watch import Call, Run

__all__ = ["match_parts"]

_GATES = ("sigmoid", "softplus")
"""Functions of `torch.nn.functional` that make numbers by which the heads of an attention are multiplied."""


def match_parts(run: Run, parts: dict[str, Part]) -> bool:
    """Fill in all fields of `LayerSpec` but ``module`` as they are found; returns whether batches come first.

    Raises `Undetected`.
    """
    reader = _Reader(run)
    reader.match_all(parts)
    return reader.batch_first


class _Reader(LayerRows):
    """Finds which of the calls plays which part."""

    def match_all(self, parts: dict[str, Part]) -> None:
        path = next((path for path, module in self.layer.named_modules() if module is self.caller), None)
        if path is None:
            raise Undetected(f"attention is computed by a {type(self.caller).__name__} that is no part of the layer")
        parts |= {"attention": path, "heads": self.heads}
        value, out = self.match_attention(parts)
        self.match_values_read(parts, value)
        self.crossed = self.match_cross(parts, out)
        if self.match_mixture(parts, out):
            return
        blocks = sorted(self.find_ff_blocks(out), key=lambda block: block[0])
        if not blocks:
            refuse_experts(self.layer)
            refuse_norms_of_neurons(self, functools.partial(self.find_ff_blocks, out))
            raise Undetected(
                "no feed-forward block down(act(up(t))) or down(act(gate(t)) * up(t)) was found: no projection but "
                f"{out.path!r} reads an activation of another one's output"
            )
        parts |= blocks[0][3]
        for _, up, down, block in blocks:
            projections = str(parts["out"]), down.path
            for streams in self.match_streams(projections, out.output, up.input, down.output):
                parts |= {**block, **streams}
                return
        refuse_experts(self.layer)
        for _, up, down, _ in blocks:
            of_block = functools.partial(self.match_streams, (out.path, down.path), out.output, up.input, down.output)
            refuse_networks_behind(self, of_block, (up, down))
        raise Undetected(
            "the layer's output is not the sum of its input, attention and feed-forward block with norms before, on or "
            "after them (is a residual scaled, or is there one branch more?)"
        )

    def match_values_read(self, parts: dict[str, Part], value: Call) -> None:
        """Notes which norm lies before attention, and the projection and norm before values that are made of a latent
        vector."""
        before = [norm for norm, tensor in self.apply_norms(self.x) if self.are_equal(tensor, value.input)]
        if before:
            parts["norm_before_attn"] = before[0]
            return
        for norm, down in product(self.norms, self.linears):
            width, columns = norm.input.shape[1], down.output.shape[1]
            if not self.are_equal(norm.output, value.input) or width > columns:
                continue
            starts = range(columns - width + 1)
            start = next((s for s in starts if self.are_equal(down.output[:, s : s + width], norm.input)), None)
            before = [name for name, tensor in self.apply_norms(self.x) if self.are_equal(tensor, down.input)]
            if start is not None and before:
                whole = width == columns
                parts |= {
                    "norm_before_attn": before[0],
                    "latent": down.path if whole else Cut(down.path, start, start + width),
                    "norm_of_latent": norm.path,
                }
                return
        raise Undetected(
            f"the value projection {value.path!r} reads neither the layer's input nor a norm of it (does another block "
            "come before attention?)"
        )

    def match_mixture(self, parts: dict[str, Part], out: Call) -> bool:
        """Notes a mixture of experts, with the network beside it that all tokens go through; tells if there is one."""
        for call in self.calls:
            found = match_experts(call, self.layer, EQUAL[self.dtype], self.wide)
            if found is None:
                continue
            parts |= found
            networks = [(None, None, None)] + [
                (down, gain, block)
                for _, up, down, block in sorted(self.find_ff_blocks(out), key=lambda block: block[0])
                if self.are_equal(up.input, call.input)
                for gain in (None, *self.find_weighers(call.input))
            ]
            for (down, gain, block), factor in product(networks, (("", 1.0), *self.numbers)):
                ff = call.output * factor[1]
                if down is not None:
                    ff = ff + (down.output if gain is None else down.output * gain.output.sigmoid())
                for streams in self.match_streams((str(parts["out"]), call.path), out.output, call.input, ff):
                    returned, stacked, of_block = streams.pop("down"), parts["down"], 1.0
                    assert isinstance(stacked, StackedPart)
                    if isinstance(returned, Product):  # of the sum of both
                        if not returned.is_number:
                            continue
                        of_block = dict(self.numbers)[returned.factor]
                    parts |= {**streams, "down": replace(stacked, factor=factor[1] * of_block)}
                    if block is not None:
                        parts |= {f"shared_{name}": part for name, part in block.items()}
                        if isinstance(returned, Product):
                            parts["shared_down"] = replace(returned, path=str(block["down"]))
                        parts["shared_weigher"] = None if gain is None else gain.path
                    return True
            refuse_norms_of_experts(self, call)
            raise Undetected(
                f"the layer's output is not the sum of its input, attention and the experts at {call.path!r}, with one "
                "network beside them at the most"
            )
        return False

    def find_weighers(self, read: Tensor) -> Iterator[Call]:
        """Yields projections of ``read`` to a single number, whose sigmoid may weigh a network."""
        yield from (call for call in self.linears if call.output.shape[1] == 1 and self.are_equal(call.input, read))

    def match_attention(self, parts: dict[str, Part]) -> tuple[Call, Call]:
        """Returns the value and the output projection, and notes them in ``parts``."""
        if isinstance(self.caller, nn.MultiheadAttention):
            path, width = str(parts["attention"]), self.caller.embed_dim
            call = next((call for call in self.calls if call.path == path), None)
            if call is not None and self.caller.in_proj_weight is not None:
                projection = f"{path}.out_proj" if path else "out_proj"
                parts |= {"kv_heads": self.heads, "value": Cut(path, 2 * width, 3 * width), "out": projection}
                return call, call
        for out, value in product(self.linears, self.linears):
            starts = None if value is out else self.find_value_starts(self.alpha, value.output, out.input)
            if starts is not None:
                parts |= {"out": out.path, **self.describe_value(value, starts, out.input.shape[1] // self.heads)}
                return value, out
        for out in self.linears:
            for gate, mixed in self.undo_gates(out):
                for value in self.linears:
                    starts = None if value is out else self.find_value_starts(self.alpha, value.output, mixed)
                    if starts is not None:
                        width = out.input.shape[1] // self.heads
                        parts |= {"out": out.path, "attention_gate": gate, **self.describe_value(value, starts, width)}
                        return value, out
        normed = find_normed_values(self)
        if normed is not None:
            norm, value, starts, out = normed
            width = out.input.shape[1] // self.heads
            parts |= {"out": out.path, "norm_of_values": norm.path, **self.describe_value(value, starts, width)}
            return value, out
        refuse_changed_heads(self)
        own = [name for name, one in self.caller.named_parameters(recurse=False) if one.dim() > 1]
        if own:
            raise Undetected(
                f"{parts['attention']!r} ({type(self.caller).__name__}) multiplies by parameters of its own "
                f"({', '.join(map(repr, own))}), which are no projections that could be read"
            )
        raise Undetected(
            "no projection reads what attention makes of another one's output (does something act on the values, or "
            "on what attention returns?)"
        )

    def match_cross(self, parts: dict[str, Part], own: Call) -> Tensor | None:
        """Notes the parts of the attention to an encoder's tokens, and returns what it adds; None where there is
        none. ``own`` is the output projection of the layer's own attention."""
        if self.cross is None:
            return None
        caller, attention = self.cross
        heads, alpha = attention.shape[1], self.read_alpha(attention).nan_to_num()
        path = next((path for path, module in self.layer.named_modules() if module is caller), None)
        if path is not None and isinstance(caller, nn.MultiheadAttention) and caller.in_proj_weight is not None:
            whole = next((call for call in self.calls if call.path == path), None)
            if whole is not None:
                width, projection = caller.embed_dim, f"{path}.out_proj" if path else "out_proj"
                read: dict[str, Part] = {"value": Cut(path, 2 * width, 3 * width), "out": projection}
                parts |= {f"cross_{name}": part for name, part in read.items()}
                parts |= {"cross_attention": path, "cross_heads": heads, "cross_kv_heads": heads}
                return whole.output
        if path is not None:
            for out, value in product(self.linears, self.of_encoder):
                starts = None if value is out or out is own else self.find_value_starts(alpha, value.output, out.input)
                if starts is not None:
                    found = self.describe_value(value, starts, out.input.shape[1] // heads)
                    found |= {"attention": path, "heads": heads, "out": out.path}
                    parts |= {f"cross_{name}": part for name, part in found.items()}
                    return out.output
        raise Undetected("no projection reads what its attention to the encoder's tokens makes of another one's output")

    def undo_gates(self, out: Call) -> Iterator[tuple[Gate, Tensor]]:
        """Yields what an output projection may have read before a gate multiplied it, for every projection that may
        have made the gate: a number for each head or for each feature, by itself or beside the query of a head."""
        width = out.input.shape[1]
        if width % self.heads:
            return
        for call in self.linears:
            columns, cut = call.output.shape[1], width // self.heads
            parts: list[str | Cut] = [call.path] if columns in (width, self.heads) else []
            if columns == 2 * width:
                parts += [Cut(call.path, half * cut, (half + 1) * cut, self.heads) for half in (1, 0)]
                parts += [Cut(call.path, half * width, (half + 1) * width) for half in (1, 0)]
            for part in parts if call is not out else ():
                made = call.output
                if isinstance(part, Cut):
                    made = made.unflatten(1, (part.groups, -1))[..., part.start : part.stop].flatten(1)
                for activation in _GATES:
                    gain = getattr(nn.functional, activation)(made)
                    yield Gate(part, activation), out.input / gain.repeat_interleave(width // gain.shape[1], 1)

    def describe_value(self, value: Call, starts: list[int], width: int) -> dict[str, Part]:
        """Returns the key/value heads, and the value projection as a module or columns of one."""
        first, heads = list(dict.fromkeys(starts)), len(starts)  # of each key/value head
        if heads % len(first) or starts != [start for start in first for _ in range(heads // len(first))]:
            raise Undetected(f"query heads read the columns {starts} of {value.path!r}, which are not groups of heads")
        together = next((n for n, start in enumerate(first) if start != first[0] + n * width), len(first))
        groups, columns = len(first) // together, value.output.shape[1]
        stride = columns // groups
        expected = [first[0] + group * stride + n * width for group in range(groups) for n in range(together)]
        if first != expected or first[0] + together * width > stride or columns % groups:
            raise Undetected(f"the columns {first} of {value.path!r}, where its values begin, are in no regular order")
        cut = Cut(value.path, first[0], first[0] + together * width, groups, self.find_bias(value, first, width))
        whole = together * width == stride and cut.bias is None
        return {"kv_heads": len(first), "value": value.path if whole else cut}

    def find_ff_blocks(
        self, out: Call, downs: Sequence[Call] | None = None
    ) -> Iterator[tuple[tuple[int, float], Call, Call, dict[str, Part]]]:
        """Yields pairs of projections with an activation between: how good (less is better), up, down, the parts.

        ``downs``: what may be the second of them, None: all."""
        for down in self.linears if downs is None else downs:
            if down is out:
                continue
            sources = [(call, *part) for call in self.linears if call is not down for part in _split_output(call, down)]
            for call, part, z in sources:
                known = list(self.apply_activations(z))
                factors: list[tuple[str | Cut | None, Tensor]] = [(None, z.new_ones(()))]
                factors += [one[1:] for one in sources if one[1] != part and self.are_equal(one[0].input, call.input)]
                for up, factor in factors:
                    gated = {"up": part, "gate": None} if up is None else {"up": up, "gate": part}
                    for rank, activation, value in (*known, *self.fit_swish(z, down.input / factor)):
                        error = self.measure_error(value * factor, down.input)
                        if error <= EQUAL[self.dtype]:
                            yield (rank, error), call, down, {**gated, "down": down.path, "activation": activation}

    def match_streams(
        self,
        projections: tuple[str, str],
        attended: Tensor,
        ff_input: Tensor,
        ff: Tensor,
        target: Tensor | None = None,
    ) -> Iterator[dict[str, Part]]:
        """Yields the norms, the scales and whether blocks are parallel that make the output (or another ``target``) of
        what both return."""
        out, down = projections
        if not attended.shape == self.x.shape == ff.shape:
            return
        for (scaled_out, a), parallel in product(self.apply_scales(out, attended), (False, True)):
            for norm_of_attn, added in self.apply_norms(a):
                behind = self.apply_norms(self.x + added)
                for norm_after_attn, of_cross, stream in self.add_cross(behind):
                    source = self.x if parallel else stream
                    before = [name for name, t in self.apply_norms(source) if self.are_equal(t, ff_input)]
                    for norm_before_ff, (scaled_down, f) in product(before, self.apply_scales(down, ff)):
                        for norm_of_ff, returned in self.apply_norms(f):
                            for norm_after_ff, result in self.apply_last(stream + returned):
                                if self.are_equal(result, self.y if target is None else target):
                                    yield {
                                        **of_cross,
                                        "out": scaled_out,
                                        "down": scaled_down,
                                        "norm_of_attn": norm_of_attn,
                                        "norm_after_attn": norm_after_attn,
                                        "norm_before_ff": norm_before_ff,
                                        "norm_of_ff": norm_of_ff,
                                        "norm_after_ff": norm_after_ff,
                                        "parallel": parallel,
                                    }

    def add_cross(
        self, streams: Iterator[tuple[str | None, Tensor]]
    ) -> Iterator[tuple[str | None, dict[str, Part], Tensor]]:
        """Yields the norm behind attention with the norms of the attention to an encoder's tokens, and the stream that
        both make; ``streams`` ``[rows, d]`` as the first leaves them."""
        for norm, stream in streams:
            if self.crossed is None:
                yield norm, {}, stream
                continue
            for norm_of, added in self.apply_norms(self.crossed):
                for norm_after, summed in self.apply_norms(stream + added):
                    yield norm, {"cross_norm_of_attn": norm_of, "cross_norm_after_attn": norm_after}, summed


def _split_output(call: Call, down: Call) -> Iterator[tuple[str | Cut, Tensor]]:
    """Yields what ``down`` may read an activation of: the whole output, either half, every other column."""
    width, columns = down.input.shape[1], call.output.shape[1]
    if columns == width:
        yield call.path, call.output
    elif columns == 2 * width:
        for half in (0, 1):
            yield Cut(call.path, half * width, (half + 1) * width), call.output[:, half * width : (half + 1) * width]
            yield Cut(call.path, half, half + 1, width), call.output[:, half::2]
