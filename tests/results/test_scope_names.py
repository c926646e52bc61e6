"""What names of scopes say."""

import pytest
from synthetic import POST_LN, PRE_LN

from ffattr.results.scope_names import extra_axis, join_stack, split_stack


def test_heads_and_experts_have_an_axis_and_no_other_scope_has():
    assert extra_axis("attn_heads") == "head"
    assert extra_axis("atb_ln_ff_experts") == extra_axis("atb_ff_experts") == "expert"
    assert {extra_axis(scope) for scope in {*POST_LN, *PRE_LN} - {"attn_heads"}} == {None}


@pytest.mark.parametrize(("stack", "scope"), [("decoder", "atb"), ("cross", "attn_heads"), ("encoder", "layer")])
def test_a_full_name_is_taken_apart_as_it_was_put_together(stack, scope):
    assert split_stack(join_stack(stack, scope)) == (stack, scope)


def test_a_name_without_a_stack():
    assert split_stack("atb") == ("", "atb")
