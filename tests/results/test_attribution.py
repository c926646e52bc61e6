"""What an `Attribution` says of itself: scopes, what was kept, one expert."""

from dataclasses import replace

import pytest
import torch
from keeping import kept, some
from synthetic import PRE_LN, attribution

from ffattr import Pool, Reduce, TopK


def test_layer_is_an_alias_for_the_last_scope():
    attr = attribution(PRE_LN)
    assert attr["layer"] is attr.maps["atb_ln_ff_res"]
    assert attr["attn"] is attr.maps["attn"]


def test_an_unknown_scope_lists_the_computed_ones():
    with pytest.raises(KeyError, match=r"no scope 'atb_ln' here; computed: atb, atb_ff \(and the alias 'layer'\)"):
        attribution(("atb", "atb_ff"))["atb_ln"]


def test_repr_is_one_short_line():
    assert repr(attribution()).startswith("Attribution(3 layers, 2 x 6 tokens, 6 queries, scopes: attn_heads, ")


def test_repr_says_what_was_kept():
    attr = some()
    endings = {TopK(3): "the 3 largest entries of each row)", Pool(2): "in blocks of 2 tokens)"}
    for asked, ending in endings.items():
        assert repr(kept(asked, attr)).endswith(f"atb_ff; {ending}")
    assert repr(kept(Reduce(lambda rows: 1), attr, cut=9)).endswith("atb_ff; no maps kept, 6 values reduced)")
    assert repr(attr).endswith("atb_ff)")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (TopK(2), r"keep=TopK.*attr.largest\['atb'\].*keep='dense'"),
        (Reduce(len), "no map of atb was kept .keep=Reduce.: attr.reduced lists .*keep='dense'"),
    ],
)
def test_maps_that_were_not_kept(asked, message):
    attr = kept(asked if isinstance(asked, TopK) else Reduce(lambda rows: None), some())
    with pytest.raises(ValueError, match=message):
        attr["atb"]
    with pytest.raises(KeyError, match="computed: attn_heads, atb, atb_ff"):
        attr["nope"]
    if isinstance(asked, Reduce):
        for view in (attr.to_pandas, lambda: attr.plot("atb"), lambda: attr.to_pandas("atb")):
            with pytest.raises(ValueError, match="keep=Reduce"):
                view()


def test_one_expert_of_the_largest_entries():
    attr = some(("atb", "atb_ff_experts"))
    generator = torch.Generator().manual_seed(3)
    shape = attr.maps["atb"].shape
    pairs = (attr.maps["atb"] > 0)[:, :, None]
    attr.maps["atb_ff_experts"] = torch.rand(*shape[:2], 2, *shape[2:], generator=generator).double() * pairs
    attr.experts = torch.tensor([1, 4]).expand(*shape[:3], 2).clone()
    attr.experts[:, :, 3] = torch.tensor([4, 0])
    cut = kept(TopK(20), attr)
    shown = torch.as_tensor(cut.plot("atb_ff_experts", 2, expert=4).axes[0].images[0].get_array())
    real = attr.mask[0].nonzero()[:, 0]
    assert torch.equal(shown, attr.of_expert(4)[1, 0][real][:, real])
    by = ["layer", "batch", "query", "key", "expert"]
    ours, theirs = (one.to_pandas("atb_ff_experts").query("norm > 0").sort_values(by) for one in (cut, attr))
    assert ours[[*by, "norm"]].to_numpy().tolist() == theirs[[*by, "norm"]].to_numpy().tolist()
    with pytest.raises(ValueError, match="keep=TopK"):
        cut.of_expert(4)


def test_maps_that_are_set_are_those_of_one_result_only():
    attr = attribution(("atb",))
    other = replace(attr, arguments={})
    maps = {"atb": attr["atb"] * 2}
    other.maps = maps
    assert other["atb"] is maps["atb"]
    assert torch.equal(attr["atb"] * 2, other["atb"])


def test_a_map_that_was_taken_out_is_said_to_be_missing(tmp_path):
    attr = attribution(("atb", "atb_ff"))
    del attr.maps["atb_ff"]
    with pytest.raises(ValueError, match="no map of atb_ff was kept"):
        attr["layer"]
    with pytest.raises(ValueError, match="nothing to save of atb_ff"):
        attr.save(tmp_path / "a.safetensors")


def test_columns_that_are_no_tokens_of_the_rows_are_said():
    from dataclasses import replace

    attr = attribution()
    assert "6 queries, scopes:" in repr(attr)
    maps = {scope: values[..., :2] for scope, values in attr.maps.items()}
    grouped = replace(attr, key_mask=attr.mask[:, :2])
    grouped.maps = maps
    assert "6 queries, 2 columns, scopes:" in repr(grouped)
