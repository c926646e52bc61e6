"""How the user's model is run: as it is, in eval mode, and put back."""

from __future__ import annotations

import pytest
import torch
from recording import assert_recomputed, run, state
from tiny_models import build
from torch import nn

import ffattr
from ffattr.errors import CaptureError, ForwardError
from ffattr.models.capture.run import (
    call_model,
    find_device,
    find_switches,
    list_configs,
    list_given_tensors,
    read_hidden_states,
    run_undisturbed,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_config_flags_do_not_collect_outputs() -> None:
    model = build("bert", output_hidden_states=True, return_dict=False)
    before = state(model)
    assert len(run("bert", model)[1]) == 2
    assert state(model) == before  # no output-collecting hooks were installed


def test_compiled_model() -> None:
    model = build("bert")
    compiled = torch.compile(model, backend="eager")
    assert_recomputed(*run("bert", compiled))
    for layer in model.encoder.layer:
        layer.compile(backend="eager")
    assert_recomputed(*run("bert", model))
    wrapped = build("llama")
    for index, layer in enumerate(wrapped.layers):
        wrapped.layers[index] = torch.compile(layer, backend="eager")
    assert_recomputed(*run("llama", wrapped))


def test_training_mode() -> None:
    with pytest.raises(CaptureError, match=r"BertModel is in training mode.*model\.eval\(\)"):
        run("bert", build("bert").train())
    model = build("bert")
    model.encoder.layer[1].output.dropout.train()
    with pytest.raises(CaptureError, match="training mode"):
        run("bert", model)


def test_training_mode_where_nothing_acts_differently() -> None:
    model = build("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    assert_recomputed(*run("bert", model))
    only_wrapper = nn.Sequential(build("bert"))
    assert only_wrapper.training
    with run_undisturbed(only_wrapper):
        pass
    by_argument = build("llama", attention_dropout=0.5)
    by_argument.layers[0].self_attn.train()
    with pytest.raises(CaptureError, match=r"training mode at 'layers.0.self_attn' \(LlamaAttention\)"):
        run("llama", by_argument)


class Noisy(nn.Module):
    """Asks for the mode, and says nothing of chances."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if self.training else x


def test_training_mode_of_a_module_that_asks_for_it() -> None:
    with pytest.raises(CaptureError, match="training mode at its own forward"), run_undisturbed(Noisy()):
        pass


def test_a_compiled_forward_is_run_eagerly() -> None:
    model, compiled = build("gpt2"), []

    def note_graph(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    model.forward = torch.compile(model.forward, backend=note_graph)
    assert_recomputed(*run("gpt2", model))
    assert not compiled  # neither the model nor the hooks on it


def test_random_model_is_noticed() -> None:
    model = build("bert")
    generator = torch.Generator().manual_seed(0)
    hook = model.embeddings.register_forward_hook(
        lambda module, args, output: output + torch.randn(output.shape, generator=generator, dtype=output.dtype)
    )
    with pytest.raises(CaptureError, match="recording changed output of BertModel"):
        run("bert", model)
    hook.remove()


def test_the_fast_path_is_off_and_gradients_are_not_kept() -> None:
    model = build("torch-pre")
    before = torch.backends.mha.get_fastpath_enabled()
    with run_undisturbed(model):
        assert not torch.backends.mha.get_fastpath_enabled()
        assert not torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert torch.is_grad_enabled()


def test_switches() -> None:
    model = build("gpt2", output_attentions=True)
    assert find_switches(model, {}) == {"use_cache": False, "output_attentions": False}
    assert find_switches(build("torch-pre"), {}) == {}


def test_every_configuration_once() -> None:
    model = build("bart")
    assert list_configs(model.modules()) == [model.config]
    assert list_configs(build("torch-pre").modules()) == []


def test_device() -> None:
    assert find_device(nn.Linear(2, 2)) == find_device(nn.Identity()) == torch.device("cpu")
    assert find_device(nn.Linear(2, 2, device="meta")) == torch.device("cpu")  # offloaded: fetched when needed


def test_hidden_states() -> None:
    x = torch.ones(1, 2, 3)
    for output in (x, (x, None), (None, (x, x + 1)), {"loss": None, "last_hidden_state": x}):
        assert read_hidden_states(output) is x
    with pytest.raises(CaptureError, match="returned a dict that holds no tensor"):
        read_hidden_states({"text": "no"})


def test_what_a_model_raises_is_the_cause_and_what_callbacks_raise_comes_as_it_is() -> None:
    model, noted = nn.Linear(3, 2), [ValueError("of a callback")]
    with pytest.raises(ForwardError, match=r"^Linear does not run on input \(1, 4\): mat1 and mat2") as found:
        call_model(model, {"input": torch.ones(1, 4)})
    assert isinstance(found.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"):
        call_model(model, {"input": torch.ones(1, 4)}, noted)
    with pytest.raises(ForwardError, match="does not run on these inputs: "):
        call_model(model, {})
    assert list_given_tensors({"b": torch.ones(1), "of": {"input_ids": torch.ones(2)}, "c": 3})[0][0] == "input_ids"


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt()])
def test_an_error_of_a_callback_is_not_taken_for_the_models(error: BaseException) -> None:
    def fail(done: int, of: int) -> None:
        raise error

    with pytest.raises(type(error)):
        ffattr.attribute(build("bert"), torch.tensor([[5, 6, 7]]), progress=fail)
