"""Passes of several threads, one inside the other, and in forked processes: none is in the way of another."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn

import ffattr
from ffattr.models.capture import passes
from ffattr.models.capture.passes import Hook, attach_hook, begin_pass, find_pass, leave_pass, share_change

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_hook_acts_in_its_pass_alone() -> None:
    module, seen = nn.Identity(), []
    with begin_pass(), ExitStack() as stack, stack:
        attach_hook(stack, module.register_forward_hook, lambda *called: seen.append("own"))
        module(torch.ones(1))
        for elsewhere in (begin_pass, leave_pass):
            with elsewhere():
                module(torch.ones(1))
        thread = threading.Thread(target=module, args=(torch.ones(1),))
        thread.start()
        thread.join()
        assert [type(hook) for hook in module._forward_hooks.values()] == [Hook]
        module(torch.ones(1))
    assert seen == ["own", "own"]
    assert not module._forward_hooks
    assert find_pass() is None


def test_a_shared_change_is_made_by_the_first_and_undone_by_the_last() -> None:
    done: list[str] = []

    def make(undo: ExitStack) -> None:
        undo.callback(done.append, "undone")
        done.append("made")

    first, second = ExitStack(), ExitStack()
    first.enter_context(share_change("it", make))
    second.enter_context(share_change("it", make))
    first.close()
    assert done == ["made"]
    second.close()
    assert done == ["made", "undone"]
    assert not passes._changes


def test_what_fails_while_it_is_made_is_undone() -> None:
    done: list[str] = []

    def make(undo: ExitStack) -> None:
        undo.callback(done.append, "undone")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), share_change("it", make):
        pass
    assert done == ["undone"]
    assert not passes._changes


def describe(model: nn.Module) -> tuple[object, ...]:
    """What a pass changes, and has to put back."""
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    config: Any = getattr(model, "config", None)
    return hooks, getattr(config, "_attn_implementation", None), torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("name", ["bert", "gpt2", "mpnet", "mixtral", "torch-pre"])
def test_four_threads_on_one_model_compute_what_one_does(name: str) -> None:
    """With attention through transformers' interface, of a module's own, and of PyTorch's; with experts."""
    model = tiny_models.build(name)
    inputs = [tiny_models.inputs(name, 1, length, seed=length) for length in (3, 5, 7, 9)]
    expected = [ffattr.attribute(model, given, scopes="all") for given in inputs]
    before = describe(model)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            found = pool.map(lambda given: ffattr.attribute(model, given, scopes="all"), inputs)
            for one, other in zip(expected, found, strict=True):
                assert all(torch.equal(one[scope], other[scope]) for scope in one.scopes)
    assert describe(model) == before
    assert not passes._changes


def test_a_callback_may_wait_for_another_thread() -> None:
    model = tiny_models.build("bert")
    given = tiny_models.inputs("bert", 1, 5)
    expected = ffattr.attribute(model, given)["layer"]
    with ThreadPoolExecutor(1) as pool:

        def wait_for_another(done: int, of: int) -> None:
            found = pool.submit(ffattr.attribute, model, given).result(timeout=60)
            assert torch.equal(found["layer"], expected)

        assert torch.equal(ffattr.attribute(model, given, progress=wait_for_another)["layer"], expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_is_forked_meanwhile_finds_everything_as_it_was() -> None:
    model = tiny_models.build("gpt2")
    given = tiny_models.inputs("gpt2", 1, 5)
    expected, before = ffattr.attribute(model, given)["layer"], describe(model)
    reached, go_on = threading.Event(), threading.Event()

    def hold(done: int, of: int) -> None:
        reached.set()
        go_on.wait(60)

    thread = threading.Thread(target=ffattr.attribute, args=(model, given), kwargs={"progress": hold})
    thread.start()
    assert reached.wait(60)
    child = os.fork()
    if child == 0:
        same = describe(model)[1:] == before[1:] and not passes._changes
        os._exit(0 if same and torch.equal(ffattr.attribute(model, given)["layer"], expected) else 1)
    _, status = os.waitpid(child, 0)
    go_on.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0
    assert describe(model) == before
