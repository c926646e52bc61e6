"""What is said of a model whose structure was not found: its modules, and a description to complete."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from textwrap import indent

from torch import nn

from ...decomposition.activations import Activation
from .parts import Cut, Gain, Gate, Part, Product, StackedPart
from .probe import Undetected

__all__ = ["draw_tree", "explain_failure", "write_template"]

_WEIGHTS = "ffattr.models.spec.weights"
_REQUIRED = ("attention", "heads", "kv_heads", "value", "out", "up", "down", "activation")
_ROWS = (  # as they are written, one line each
    ("attention", "heads", "kv_heads"),
    ("value", "out"),
    ("up", "down", "gate"),
    ("activation",),
    ("norm_before_attn", "norm_of_attn", "norm_after_attn"),
    ("norm_before_ff", "norm_of_ff", "norm_after_ff", "parallel"),
    ("experts", "active"),
    ("attention_gate", "norm_of_values"),
)
_LINES = 25


def explain_failure(base: nn.Module, model_type: str, found: Undetected) -> str:
    """Shows the first layer of a model, or the whole where layers were not found, and a description to complete."""
    where, module, each = "Its modules", base, None
    if found.layers is not None:
        layers = base.get_submodule(found.layers)
        where, module = f"The first layer of {found.layers!r}", next(iter(layers.children()))
        each = _write_layers(layers, _write_expression("base", found.layers), found.numbers)
    code = write_template(model_type, found.layers, found.parts, found.batch_first, each)
    what = "To complete, without the norms that it does not have"
    if "..." not in code:
        what = "What was found, which does not reproduce every layer; to correct"
    return (
        f"{where}:\n\n{indent(draw_tree(module), '    ')}\n\n"
        f"{what}, and to run before ffattr is called:\n\n{indent(code, '    ')}"
    )


def _write_layers(layers: nn.Module, path: str, numbers: Sequence[int] | None) -> str:
    """Writes what to go through: a list, or those of its modules that are layers, ``numbers`` of them (None: all)."""
    keys = [name if isinstance(layers, nn.ModuleDict) else int(name) for name, _ in layers.named_children()]
    kept = [key for key, module in zip(keys, layers.children(), strict=True) if not isinstance(module, nn.Identity)]
    wanted = kept if numbers is None else [kept[number] for number in numbers]
    if not isinstance(layers, nn.ModuleDict) and wanted == list(range(len(layers._modules))):
        return path
    return f"({', '.join(f'{path}[{key!r}]' for key in wanted)},)"


def write_template(
    model_type: str,
    layers: str | None,
    parts: Mapping[str, Part],
    batch_first: bool = True,
    each: str | None = None,
) -> str:
    """Writes Python that registers an adapter, from a description as far as it is known, with ``...`` for the rest.

    ``each`` is what its layers are, None: all of the list at ``layers``.
    """
    rows = []
    for names in _ROWS:
        fields = [f"{name}={_write_part(name, parts)}" for name in names if _is_written(name, parts)]
        if fields:
            rows.append(f"            {', '.join(fields)},")
    shared = [name for name in parts if name.startswith("shared_")]
    beside = [f"{name.removeprefix('shared_')}={_write_part(name, parts)}" for name in shared]
    if beside:
        rows.append(f"            shared=ffattr.BranchSpec({', '.join(beside)}),")
    crossing = {name: part for name, part in parts.items() if name.startswith("cross_") and part is not None}
    if crossing:
        fields = [f"{name.removeprefix('cross_')}={_write_part(name, parts)}" for name in crossing]
        rows.append(f"            cross=ffattr.CrossSpec({', '.join(fields)}),")
    if "latent" in parts:
        both = f"{_write_part('latent', parts)}, {_write_part('norm_of_latent', parts)}"
        rows.append(f"            latent=ffattr.LatentSpec({both}),")
    each = ("..." if layers is None else _write_expression("base", layers)) if each is None else each
    return "\n".join(
        (
            "import ffattr",
            *["import torch"] * any("torch." in row for row in rows),
            "",
            "def adapter(base):",
            "    return [",
            "        ffattr.LayerSpec(",
            "            module=layer,",
            *rows,
            "        )",
            f"        for layer in {each}",
            "    ]",
            "",
            f'ffattr.register_adapter("{model_type}", adapter{"" if batch_first else ", batch_first=False"})',
        )
    )


def _is_written(name: str, parts: Mapping[str, Part]) -> bool:
    """Tells whether to write a part: one that is there or must be, or a norm that most layers have if none is known."""
    if name in parts:
        return parts[name] is not None and parts[name] is not False
    return name in (*_REQUIRED, "norm_before_attn", "norm_before_ff")


def _write_part(name: str, parts: Mapping[str, Part]) -> str:
    part = parts.get(name, ...)
    if isinstance(part, Activation) and part.name.startswith("swish("):
        return f"ffattr.decomposition.activations.make_{part.name}"
    if isinstance(part, Activation):
        return f"ffattr.decomposition.activations.ACTIVATIONS[{part.name!r}]"
    if isinstance(part, Cut):
        more = "" if part.groups == 1 else f", groups={part.groups}"
        more += "" if part.bias is None else f", bias={_write_reference(part.bias)}"
        return f"ffattr.Columns({_write_expression('layer', part.path)}, {part.start}, {part.stop}{more})"
    if isinstance(part, Gain):
        return f"ffattr.GainSpec(layer, {part.name!r})"
    if isinstance(part, Gate):
        made = _write_part("of", {"of": part.of})
        return f"ffattr.GateSpec({made}, torch.nn.functional.{part.activation})"
    if isinstance(part, Product):
        factor = _write_reference(part.factor)
        if part.is_number:
            factor = f"torch.tensor({_write_expression('layer', part.factor)}, dtype=torch.float64)"
        return f"{_WEIGHTS}.Scaled({_write_expression('layer', part.path)}, {factor})"
    if isinstance(part, StackedPart):
        given = (part.weight, part.bias, part.start, part.stop, part.step, part.out_last, part.factor)
        arguments = ", ".join([_write_expression("layer", part.path), *map(repr, given)])
        return f"ffattr.models.spec.experts.Stacked({arguments})"
    if isinstance(part, str):
        return _write_expression("layer", part)
    return "..." if part is ... else repr(part)


def _write_reference(path: str) -> str:
    """Writes the parameter at a path from the layer."""
    owner, _, attribute = path.rpartition(".")
    return f"{_WEIGHTS}.ParameterRef({_write_expression('layer', owner)}, {attribute!r})"


def _write_expression(root: str, path: str) -> str:
    return re.sub(r"\.(\d+)", r"[\1]", f"{root}.{path}" if path else root)


def draw_tree(module: nn.Module) -> str:
    """Draws a module and those below it, with the shapes of their weights: at most 25 lines."""
    lines = [_draw_line(type(module).__name__, module), *_draw_branches(module, "  ")]
    if len(lines) > _LINES:
        lines[_LINES - 1 :] = [f"  ... and {len(lines) - _LINES + 1} more"]
    return "\n".join(lines)


def _draw_branches(module: nn.Module, indent: str) -> Iterator[str]:
    children = list(module.named_children())
    alike = isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(child) for _, child in children}) == 1
    for name, child in children[:1] if alike else children:
        times = f" (and {len(children) - 1} more)" if alike and len(children) > 1 else ""
        yield _draw_line(f"{indent}{name}: {type(child).__name__}{times}", child)
        yield from _draw_branches(child, f"{indent}  ")


def _draw_line(start: str, module: nn.Module) -> str:
    own = (f"{name} {list(value.shape)}" for name, value in module.named_parameters(recurse=False) if name != "bias")
    return f"{start} {', '.join(own)}".rstrip()
