"""The data of heads is well formed."""

from __future__ import annotations

from ffattr.decomposition.activations import ACTIVATIONS
from ffattr.models.families.heads import FINAL_NORMS, HEADS


def test_no_entry_is_there_twice_and_the_plainest_final_norm_is_none():
    assert len({(entry.steps, entry.reads) for entry in HEADS}) == len(HEADS)
    assert FINAL_NORMS[0] == ()
    assert len(set(FINAL_NORMS)) == len(FINAL_NORMS)


def test_functions_without_a_module_are_known_and_the_last_step_is_a_path():
    for entry in HEADS:
        assert all(step[1:] in ACTIVATIONS for step in entry.steps if step.startswith("=")), entry
        assert not entry.steps[-1].startswith("=")
        assert entry.reads
