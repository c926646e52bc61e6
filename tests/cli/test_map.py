"""``ffattr map``: the files that it writes, the table of the strongest pairs, the plan."""

import json

import pytest
import tiny_models
import torch
from commands import fails, run
from made_tokenizers import wordpiece
from matplotlib.figure import Figure

from ffattr import Pool, attribute, load
from ffattr.cli import map as map_command
from ffattr.models import pretrained
from ffattr.results import Attribution, files


def test_map_writes_files(calls, tmp_path):
    output, png = tmp_path / "maps.safetensors", tmp_path / "map.png"
    result = run("map", "m", "text", "-o", output, "--png", png)
    assert result.exit_code == 0, result.output
    assert load(output).layers == (0, 2, 5)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [png, output]


def test_map_writes_a_page_of_all_scopes(calls, tmp_path):
    page = tmp_path / "maps.html"
    result = run("map", "m", "text", "--html", page)
    assert result.exit_code == 0, result.output
    assert calls[0][2]["scopes"] == "all"
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert f"page: {page}" in result.stdout.replace("\n", "")
    assert run("map", "m", "text", "--html", page, "--scope", "atb").exit_code == 0
    assert calls[1][2]["scopes"] == "atb"


def test_map_without_files_prints_the_strongest_pairs(calls):
    result = run("map", "m", "text")
    assert "attention block + FF + residual + norm" in result.stdout
    assert "(atb_ff_res_ln), layer 5" in " ".join(result.stdout.split())
    assert "tok0." in result.stdout
    assert "a plan" not in result.stdout
    assert "a plan" in run("map", "m", "text", "--verbose").stdout


def test_another_layer_is_listed(calls):
    assert "layer 2" in run("map", "m", "text", "--layer", 2).stdout
    fails(2, "layer 3 was not computed; computed: 0, 2, 5", "map", "m", "text", "--layer", 3)


def test_json_lists_the_strongest_pairs_of_the_first_sequence(calls, tmp_path):
    result = run("map", "m", "text", "--json", "-o", tmp_path / "maps")
    said = json.loads(result.stdout)
    assert (said["scope"], said["layer"], said["measure"], len(said["pairs"])) == ("atb_ff_res_ln", 5, "norm", 10)
    assert list(said["pairs"][0]) == ["rank", "query", "key", "query_token", "key_token", "norm", "share"]
    assert "maps: " in result.stderr
    norms = [pair["norm"] for pair in said["pairs"]]
    assert norms == sorted(norms, reverse=True)


def test_tokens_are_listed_without_their_marks():
    assert [map_command._spell(token) for token in ("Ġcat", "▁cat", "##s", "Ġ", "[CLS]")] == [
        *("cat", "cat", "s", "Ġ", "[CLS]")
    ]


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.PDF", b"%PDF")])
def test_a_picture_has_the_format_of_its_name(calls, tmp_path, name, begins):
    assert run("map", "m", "text", "--picture", tmp_path / name).exit_code == 0
    assert (tmp_path / name).read_bytes().startswith(begins)


def test_pictures_of_heads(calls, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(Attribution, "plot", lambda attr, **options: drawn.append(options) or Figure())
    options = ["--scope", "attn_heads", "--head", 1, "--layer", 2, "--scale", "linear"]
    assert run("map", "m", "text", "--picture", tmp_path / "a.png", *options).exit_code == 0
    assert drawn == [{"layer": 2, "head": 1, "scale": "linear"}]


@pytest.fixture(scope="module")
def bert():
    return tiny_models.build("bert")


TEXT = "the cat sat on a mat"  # and [CLS], [SEP]


@pytest.mark.parametrize("options", [[], ["--words"], ["--top", "3"], ["--words", "--top", "3"]])
def test_the_strongest_pairs_are_those_of_different_tokens(bert, tokenizer, monkeypatch, options):
    monkeypatch.setattr(pretrained, "load", lambda name: (bert, tokenizer))
    monkeypatch.setattr(map_command, "_PAIRS", 1)
    result = run("map", "m", TEXT, *options)
    assert result.exit_code == 0, result.output
    whole = attribute(bert, TEXT, tokenizer=tokenizer)["layer"][-1, 0].fill_diagonal_(0)
    query, key = divmod(int(whole.argmax()), 8)
    names = ["[CLS]", *TEXT.split(), "[SEP]"]
    for shown in (f"{query} {names[query]}", f"{key} {names[key]}", f"{whole.max():.3g}"):
        assert f" {shown} " in result.stdout


def test_the_strongest_pairs_of_words_and_of_blocks(bert, monkeypatch):
    """Subwords, so that columns are no tokens."""
    tokenizer = wordpiece()
    text = "cats playing the cats."
    monkeypatch.setattr(pretrained, "load", lambda name: (bert, tokenizer))
    monkeypatch.setattr(map_command, "_PAIRS", 1)
    word = torch.tensor([0, 1, 1, 2, 2, 3, 4, 4, 5, 6])
    whole = attribute(bert, text, tokenizer=tokenizer, groups="words")["layer"][-1, 0].clone()
    whole[torch.arange(10), word] = 0
    key = int(whole.argmax()) % 7
    result = run("map", "m", text, "--words")
    assert f" {key} {['[CLS]', 'cats', 'playing', 'the', 'cats', '.', '[SEP]'][key]} " in result.stdout
    assert f" {whole.max():.3g} " in result.stdout
    pooled = attribute(bert, text, tokenizer=tokenizer, keep=Pool(4))["layer"][-1, 0].clone().fill_diagonal_(0)
    result = run("map", "m", text, "--pool", 4)
    assert " … " in result.stdout
    assert f" {pooled.max():.3g} " in result.stdout


def test_what_vectors_are_reduced_to(bert, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "load", lambda name: (bert, tokenizer))
    result = run("map", "m", TEXT, "--reduce", "alti")
    assert result.exit_code == 0, result.output
    assert "ALTI" in result.stdout
    output = tmp_path / "maps.safetensors"
    assert run("map", "m", TEXT, "--reduce", "l1", "-o", output).exit_code == 0
    expected = attribute(bert, TEXT, tokenizer=tokenizer, reduce="l1")
    assert load(output).reduce == "l1"
    assert torch.equal(load(output)["layer"], expected["layer"])
    assert "reduce='l1'" in run("map", "m", TEXT, "--reduce", "l1", "--plan").stdout
    fails(2, "--reduce 'l3': expected one of l2, l1, alti", "map", "m", TEXT, "--reduce", "l3")


def test_plan_computes_nothing(calls):
    result = run("map", "m", "text", "--plan")
    assert result.stdout.strip() == "direct on torch [3 layers]"
    assert not calls[0][2].keys() & {"progress", "keep"}


def test_ctrl_c_exits_with_130_and_leaves_no_file(calls, monkeypatch, tmp_path):
    def half(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_file", half)
    result = fails(130, "interrupted", "map", "m", "text", "-o", tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
    assert "maps:" not in result.stdout
