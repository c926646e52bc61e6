"""What a Transformer layer is, as data: the description adapters write and every computation reads.

Conventions: row vectors, ``y = x @ weight + bias``; ``T`` tokens, ``N`` selected query tokens, ``d`` model width,
``H`` query heads, ``Hkv`` key/value heads, ``dh`` head width, ``F`` feed-forward width, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from ...decomposition.activations import Activation
from ...decomposition.affine import Linear
from ...decomposition.clamp import Clamp
from ...decomposition.layer import Branch, CrossWeights, Latent, LayerWeights
from ...decomposition.precision import find_narrowest, without_autocast
from ...decomposition.scopes import Scoped
from ...errors import UnsupportedModel
from .activation import identify_activation
from .experts import Stacked, read_stacked
from .norms import GainSpec, read_norm
from .values import ValueNormSpec
from .weights import Columns, Scaled, read_linear
from .wrapped import find_compute_dtype

__all__ = ["BranchSpec", "CrossSpec", "GateSpec", "LatentSpec", "LayerSpec"]


@dataclass(frozen=True)
class BranchSpec:
    """Which module plays which part in a feed-forward network that all tokens go through beside a mixture of experts.

    What it returns is multiplied by the sigmoid of what ``weigher`` returns for a token, one number, where there is
    one.

    >>> up, down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
    >>> ffattr.BranchSpec(up=up, down=down, activation=torch.nn.functional.gelu).weights(torch.float64).width
    16
    """

    up: nn.Module | Columns
    down: nn.Module | Scaled
    activation: Callable[[Tensor], Tensor] | Activation
    gate: nn.Module | Columns | None = None
    weigher: nn.Module | None = None

    def weights(self, dtype: torch.dtype | None) -> Branch:
        """Reads the parameters in ``dtype`` (None: as they are, nothing copied)."""
        return Branch(
            up=read_linear(self.up, dtype),
            gate=None if self.gate is None else read_linear(self.gate, dtype),
            down=read_linear(self.down, dtype),
            activation=identify_activation(self.activation),
            weighed=self.weigher is not None,
        )


@dataclass(frozen=True)
class LatentSpec:
    """Which modules lie between what attention reads and the value projection, where that reads a latent vector: a
    projection and then a norm (multi-head latent attention).

    >>> ffattr.LatentSpec(torch.nn.Linear(8, 4), torch.nn.RMSNorm(4)).weights(torch.float64).down.weight.shape
    torch.Size([8, 4])
    """

    down: nn.Module | Columns
    norm: nn.Module

    def weights(self, dtype: torch.dtype | None) -> Latent:
        """Reads the parameters in ``dtype`` (None: as they are, nothing copied)."""
        down = read_linear(self.down, dtype)
        norm = read_norm(self.norm, dtype, down.weight.shape[1])
        assert norm is not None
        return Latent(down, norm)


@dataclass(frozen=True)
class GateSpec:
    """Which module makes the numbers that multiply what the heads return, before the output projection: ``activation``
    of what ``module`` returns for a token, one number for each head or one for each feature of each head.

    >>> ffattr.GateSpec(torch.nn.Linear(8, 8)).compute_gain(torch.zeros(1, 5, 8)).unique()
    tensor([0.5000])
    """

    module: nn.Module | Columns
    activation: Callable[[Tensor], Tensor] = torch.sigmoid

    @property
    def gate_module(self) -> nn.Module:
        """The module whose output holds the numbers."""
        return self.module.module if isinstance(self.module, Columns) else self.module

    def compute_gain(self, output: Tensor) -> Tensor:
        """Returns the factors ``[..., G]`` of what that module returned."""
        if isinstance(self.module, Columns):
            grouped = output.unflatten(-1, (self.module.groups, -1))
            output = grouped[..., self.module.start : self.module.stop].flatten(-2)
        return self.activation(output)


@dataclass(frozen=True)
class CrossSpec:
    """Which module plays which part in cross-attention. The input of ``value`` is taken for the encoder's output.

    >>> attention = torch.nn.Linear(8, 8)  # of a decoder layer, what attends to the encoder's tokens
    >>> value, out = torch.nn.Linear(12, 8), torch.nn.Linear(8, 8)
    >>> ffattr.CrossSpec(attention, 2, 2, value, out).weights(torch.float64).value.weight.shape
    torch.Size([12, 8])
    """

    attention: nn.Module
    heads: int
    kv_heads: int
    value: nn.Module | Columns
    out: nn.Module
    norm_after_attn: nn.Module | None = None
    norm_of_attn: nn.Module | None = None

    @property
    def value_module(self) -> nn.Module:
        """The module that reads the encoder's output."""
        return self.value.module if isinstance(self.value, Columns) else self.value

    def weights(self, dtype: torch.dtype | None) -> CrossWeights:
        """Reads the parameters in ``dtype`` (None: as they are, nothing copied)."""
        out = read_linear(self.out, dtype)
        return CrossWeights(
            heads=self.heads,
            kv_heads=self.kv_heads,
            value=read_linear(self.value, dtype),
            out=out,
            norm_of_attn=read_norm(self.norm_of_attn, dtype, out.weight.shape[1]),
            norm_after_attn=read_norm(self.norm_after_attn, dtype, out.weight.shape[1]),
        )


@dataclass(frozen=True)
class LayerSpec(Scoped):
    """Which module of a loaded model plays which part in one layer: what an adapter returns per layer.

    ``module`` is the layer itself (its input and output are recorded), ``attention`` the module that calls the
    attention function. Projections are ``nn.Linear``, transformers' ``Conv1D`` or `Columns` of a fused one.
    ``weights(dtype)`` reads the parameters, so that nothing of the model is copied before its layer's turn.

    In a mixture, projections of the feed-forward block are `Stacked`, ``experts`` is the module that is called with
    hidden states, the experts of each token and their weights, and ``active`` is how many experts a token goes to.
    Where that module is called otherwise, ``router`` is one whose output has a number for each token and expert, zero
    for those that the token does not go to; ``scales_input``: these multiply what experts read, not what they return.
    ``shared`` is a network beside the experts that all tokens go through. ``latent`` is what lies before ``value``,
    ``attention_gate`` what multiplies the heads behind it, ``norm_of_values`` a norm of every head's values.
    ``norm_after_ff`` may be a `GainSpec`, which multiplies the layer's output.

    >>> layer = model.encoder.layer[0]
    >>> attention, output = layer.attention, layer.output
    >>> spec = ffattr.LayerSpec(
    ...     module=layer, attention=attention.self, heads=2, kv_heads=2,
    ...     value=attention.self.value, out=attention.output.dense, norm_after_attn=attention.output.LayerNorm,
    ...     up=layer.intermediate.dense, down=output.dense, norm_after_ff=output.LayerNorm,
    ...     activation=layer.intermediate.intermediate_act_fn,
    ... )
    >>> spec.scopes  # follow from where the norms are
    ('attn_heads', 'attn', 'attn_res', 'atb', 'atb_ff', 'atb_ff_res', 'atb_ff_res_ln')
    >>> spec.weights(torch.float32).branches[0].up.weight.shape  # [d, F]
    torch.Size([40, 52])
    """

    module: nn.Module
    attention: nn.Module
    heads: int
    kv_heads: int
    value: nn.Module | Columns
    out: nn.Module | Scaled
    up: nn.Module | Columns | Stacked
    down: nn.Module | Scaled | Stacked
    activation: Callable[[Tensor], Tensor] | Activation
    gate: nn.Module | Columns | Stacked | None = None
    norm_before_attn: nn.Module | None = None
    norm_of_attn: nn.Module | None = None
    norm_after_attn: nn.Module | None = None
    norm_before_ff: nn.Module | None = None
    norm_of_ff: nn.Module | None = None
    norm_after_ff: nn.Module | GainSpec | None = None
    parallel: bool = False
    clamp: Clamp | None = None
    experts: nn.Module | None = None
    active: int = 1
    cross: CrossSpec | None = None
    shared: BranchSpec | None = None
    router: nn.Module | None = None
    scales_input: bool = False
    latent: LatentSpec | None = None
    attention_gate: GateSpec | None = None
    norm_of_values: nn.Module | None = None

    @property
    def networks_per_token(self) -> int:
        """How many networks of a mixture a token goes through: its experts, and the shared one."""
        return self.active + (self.shared is not None)

    @property
    def mixed_heads(self) -> int:
        """How many sets of attention weights mix the tokens: heads, or their features where each has a gate."""
        return self.heads * (
            1 if self.attention_gate is None else self._count_gated_features(read_linear(self.out, None))
        )

    @property
    def values(self) -> ValueNormSpec | None:
        """The norm of every head's values, with what makes them; None where there is none."""
        norm = self.norm_of_values
        return None if norm is None else ValueNormSpec(norm, self.value, self.kv_heads)

    @property
    def rounds_to_float32(self) -> bool:
        """Tells whether a norm may round to float32, whatever the model's dtype, as those of transformers' own do."""
        norms = [getattr(self, field.name) for field in fields(self) if field.name.startswith("norm_")]
        norms += [] if self.latent is None else [self.latent.norm]
        exact = nn.LayerNorm, nn.RMSNorm, GainSpec
        return any(norm is not None and type(norm) not in exact for norm in norms)

    @property
    def narrowest_dtype(self) -> torch.dtype | None:
        """The narrowest dtype in which any projection computes, whatever that of the hidden states: that of its
        parameters, or one that it is told (bitsandbytes' 4-bit layers)."""
        found: list[torch.dtype | None] = []
        for part in (self.value, self.out, self.up, self.gate, self.down):
            if part is None:
                continue
            module = part if isinstance(part, nn.Module) else part.module
            told = find_compute_dtype(module)
            own = [one.dtype for one in module.parameters() if one.is_floating_point() and one.dtype.itemsize > 1]
            found += own if told is None else [told]
        return find_narrowest(found)

    def weights(self, dtype: torch.dtype | None) -> LayerWeights:
        """Reads the layer's parameters in ``dtype`` (None: as they are, nothing copied).

        Raises `UnsupportedModel` for a module that no formula covers.
        """
        with without_autocast():  # modules are asked what they compute
            return self._read(dtype)

    def _read(self, dtype: torch.dtype | None) -> LayerWeights:
        branches = [
            Branch(
                up=_read_projection(self.up, dtype),
                gate=None if self.gate is None else _read_projection(self.gate, dtype),
                down=_read_projection(self.down, dtype),
                activation=identify_activation(self.activation),
                clamp=self.clamp,
                scales_input=self.scales_input,
            )
        ]
        if self.shared is not None:
            branches.append(self.shared.weights(dtype))
            if (self.shared.gate is None) != (self.gate is None):
                raise UnsupportedModel("experts are gated and the network beside them is not, or the other way round")
        out = read_linear(self.out, dtype)
        width = out.weight.shape[1]
        features = self._count_gated_features(out)
        value = read_linear(self.value, dtype)
        return LayerWeights(
            heads=self.heads * features,
            head_features=features,
            kv_heads=self.kv_heads,
            value=value if self.values is None else self.values.stretch(value),
            out=out,
            branches=tuple(branches),
            norm_before_attn=read_norm(self.norm_before_attn, dtype, width),
            norm_of_attn=read_norm(self.norm_of_attn, dtype, width),
            norm_after_attn=read_norm(self.norm_after_attn, dtype, width),
            norm_before_ff=read_norm(self.norm_before_ff, dtype, width),
            norm_of_ff=read_norm(self.norm_of_ff, dtype, width),
            norm_after_ff=read_norm(self.norm_after_ff, dtype, width),
            parallel=self.parallel,
            cross=None if self.cross is None else self.cross.weights(dtype),
            latent=None if self.latent is None else self.latent.weights(dtype),
        )

    def _count_gated_features(self, out: Linear) -> int:
        """Counts the features of a head that have gates of their own; 1 where there is none, or one for each head."""
        if self.attention_gate is None:
            return 1
        gates = read_linear(self.attention_gate.module, None).weight.shape[1]
        if gates not in (self.heads, len(out.weight)):
            raise UnsupportedModel(
                f"the gate of attention makes {gates} numbers, expected {self.heads}, one for each head, or "
                f"{len(out.weight)}, one for each feature that the output projection reads"
            )
        return gates // self.heads


def _read_projection(part: nn.Module | Columns | Scaled | Stacked, dtype: torch.dtype | None) -> Linear:
    return read_stacked(part) if isinstance(part, Stacked) else read_linear(part, dtype)
