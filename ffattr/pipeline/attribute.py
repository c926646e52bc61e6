"""`attribute`: from a loaded model and its inputs to maps. The story of the package, in one function."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..decomposition.attention import LayerRecord
from ..decomposition.sketch import Sketch
from ..models.inputs.readable import select_readable
from ..ops.reduction import Reduction
from ..results import Attribution, StackedAttribution
from ..results.contents import describe_skipped
from ..results.keep import Keep, parse_keep
from ..selection import Indices
from .assemble import ResultBuilder
from .entrance import accept_containers, name_broken_weights
from .options import IG, Options, Progress, check_progress
from .request import Request

__all__ = ["attribute"]


@accept_containers
@name_broken_weights
def attribute(
    model: nn.Module,
    inputs: Any,
    *,
    tokenizer: Any = None,
    scopes: str | Sequence[str] = "layer",
    layers: Indices = None,
    queries: Indices = None,
    ig: IG = "exact",
    baseline: str | Tensor = "zero",
    value_bias: str = "token",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    method: str | Sketch = "auto",
    memory_budget: int | None = None,
    check: bool = True,
    progress: Progress | None = None,
    keep: str | Keep = "dense",
    keys: Indices = None,
    groups: Any = None,
    reduce: Reduction = "l2",
    toward: Tensor | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> Attribution:
    """How much each token contributes to each token, in every layer: the norms of the decomposed vectors.

    Runs the model's own forward pass once and leaves the model as it was. With ``check`` the first call of a kind
    runs it twice, to see that recording changes nothing. Any number of threads may do so at once, on one model as well,
    and ``progress`` and functions of ``keep`` may wait for them: no lock is held while these run.

    model: a loaded transformers model (or a pipeline, or a SentenceTransformer), one of PyTorch's own
        (``nn.Transformer``, its encoder and decoder, and
        their layers) or a module of one's own, in eval mode.
    inputs: what the model takes (a mapping of tensors, ids ``[B, T]``, a float tensor; numpy arrays as well), lists of
        ids, or with ``tokenizer`` a text, texts (a list, a pandas Series) or conversations: lists of messages with
        ``role`` and ``content``, through its chat template.
    scopes: ``"layer"`` (the last), ``"all"``, a name or names: how far through the layer the vectors are carried.
        A mixture of experts has one more, which ``"all"`` leaves out: ``"atb_ln_ff_experts"``, by expert.
    layers, queries: indices (negative ones from the end), a slice, or None for all. A query is a position of the
        padded input; rows of padding are zero. The cost is proportional to the number of queries.
    ig: ``"exact"``, `ffattr.Riemann` or `ffattr.GaussLegendre`: Integrated Gradients through the FF activation.
    baseline: start of its path: ``"zero"``, ``"bias"``, or pre-activations ``[F]`` (gated: ``[F]`` or ``[2, F]``), in a
        mixture those of every expert.
    value_bias: ``"token"`` (b_V stays with its token, as in the papers of 2020 and 2021) or ``"separate"`` (goes to
        the bias).
    dtype: precision of the products with the feed-forward matrices: ``torch.float64``, ``float32``,
        ``bfloat16``, ``float16`` or ``float8_e4m3fn``; None: float64 for a float64 model, a half model's own on a GPU,
        else float32. Everything else, the maps included, is float64 with float64 and float32 otherwise.
    backend: ``"auto"``, ``"cpu"`` (C++), ``"triton"`` or ``"cuda"`` (GPU), ``"torch"`` or ``"reference"``; ``ffattr
        info`` says which run here and in which dtypes. ``"auto"`` never picks ``"cuda"``.
    method: ``"auto"``, ``"direct"``, ``"operator"``, ``"mixed"`` or ``"pairs"``, all exact; `ffattr.plan` says which is
        chosen, and why. `ffattr.Sketch` is approximate, and cheaper where a layer is wide; ``attr.sketch_error[scope]``
        says by how much it is wrong.
    memory_budget: bytes of working memory besides the maps. Where memory runs out all the same, a layer is computed
        again in smaller blocks; `OutOfMemory` says that the smallest do not fit.
    progress: called with (layers done, layers in all), layers of every batch that texts are cut into.
    check: compare the recomputed layer outputs with the model's; a difference raises `ArchitectureMismatch`.

    keep: what becomes of the maps: ``"dense"``, or `ffattr.Dense` (another dtype, a memory-mapped file), `ffattr.TopK`
        (``attr.largest``), `ffattr.Pool` (block means) or `ffattr.Reduce` (``attr.reduced``). Of long sequences nothing
        else is ever held.
    keys: which tokens' contributions are wanted, as ``queries``; None for all.
    groups: tokens whose vectors are added up before their norm is taken: ``"words"``, column numbers ``[B, T]`` (-1:
        left out), or for each sequence a list of spans ``(start, stop)``. Columns of the maps are then groups.
    reduce: what each vector becomes: ``"l2"``, its norm; ``"l1"``, its L1 norm; ``"alti"``, by how much the query's
        whole stream ``y`` at the scope is nearer to it than to nothing, ``max(0, ||y||_1 - ||y - v||_1)``, in parts of
        the row's sum (Ferrando et al. 2022, arXiv 2203.04212, where ``y`` is the scope ``atb``). Rows of ALTI add up to
        1 over the columns that there are; behind cross-attention, over those of both maps. `ffattr.ops.reduction`
        has the details. ``bias`` is reduced likewise.
    toward: a direction ``[d]``: maps then hold what it reads of each vector, ``<toward, F_i(x_j)>``, with its sign, and
        ``bias`` what it reads of that; rows and bias add up to what it reads of the stream. It takes no work of the
        model's width for a pair of tokens. (`ffattr.contributions` follows a logit through all layers.)

    on_error: ``"skip"`` leaves texts (conversations, lists of ids) out of a list that cannot be read: empty, longer
        than the model has positions, no text at all. ``attr.skipped`` has their places in the list, the type of the
        error and its message, ``attr.taken`` the place of each sequence that there is.

    Returns an `Attribution`; ``maps[scope]`` is ``[layers, B, queries, T]`` (``attn_heads``: heads before queries). Of
    a model with an encoder and a decoder a `StackedAttribution`: ``maps["cross.atb"]`` and so on; ``layers`` and
    ``queries`` are then counted in each stack, and ``scopes`` may name one ("cross.layer", "encoder.all").
    Method: after Kobayashi et al. 2024 (arXiv 2302.00456); `ffattr.decomposition` has the formulas. Raises ValueError,
    TypeError, IndexError or an `FfattrError`.

    >>> attr = ffattr.attribute(model, "The cat sat.", tokenizer=tokenizer, scopes=["atb", "layer"])
    >>> attr
    Attribution(3 layers, 1 x 6 tokens, 6 queries, scopes: atb, atb_ff_res_ln)
    >>> attr["layer"].shape  # [layers, batch, query, key]
    torch.Size([3, 1, 6, 6])
    >>> bool(attr.error.max() < 1e-12)  # the recomputed layer outputs are the model's own
    True
    >>> alti = ffattr.attribute(model, "The cat sat.", tokenizer=tokenizer, scopes="atb", reduce="alti")
    >>> alti["atb"].sum(-1).allclose(torch.ones(3, 1, 6, dtype=torch.float64))
    True
    """
    options = Options(
        *(scopes, layers, queries, keys, groups, ig, baseline, value_bias, dtype, backend, method, memory_budget),
        *(reduce, toward),
    )
    check_progress(progress)
    inputs, skipped = select_readable(model, inputs, tokenizer, on_error)
    policy = parse_keep(keep)
    request = Request.from_options(model, inputs, tokenizer, options)
    if request.description.stacks:
        policy.check_stacks()
    arguments = {
        **request.describe_arguments(),
        "method": str(method),
        "keep": str(keep),
        "reduce": reduce if toward is None else "toward",
        "check": str(check),
        **describe_skipped(skipped),
    }
    batches = request.batches()
    builders: list[ResultBuilder] = []  # one after the other, so that those before one that fails can be discarded
    reached = 0

    def on_layer(captured: LayerRecord, batch: Sequence[int]) -> None:
        nonlocal reached
        stack = request.stack_of_layer(captured.index)
        builders[request.stacks.index(stack)].add_layer(captured, batch)
        reached += len(stack.result_layers(captured.index - stack.first))
        if progress is not None:
            progress(reached, len(batches) * len(request.recorded))

    try:
        builders.extend(ResultBuilder(request, stack, policy, dict(arguments), check) for stack in request.stacks)
        for batch, of_batch in batches:
            request.run_model(of_batch, functools.partial(on_layer, batch=batch), check)
        found = {name: result for builder in builders for name, result in builder.results().items()}
    except BaseException:  # an interrupt as well: no half a file stays
        for builder in builders:
            builder.discard()
        raise
    return found[""] if "" in found else StackedAttribution.of(found)
