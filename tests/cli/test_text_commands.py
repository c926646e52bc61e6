import pytest
import torch
from commands import fails, run

from ffattr import Pool, TopK
from ffattr.decomposition.integrated_gradients import GaussLegendre, Riemann


def test_map_passes_what_was_asked_for(calls, tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\ufeffGrüße", encoding="utf-8")  # as some editors begin a file
    options = [
        "--scope",
        "atb",
        "--scope",
        "layer",
        "--layers",
        "0,-1",
        "--ig",
        "riemann:50:midpoint",
        "--dtype",
        "float64",
    ]
    options += ["--value-bias", "separate", "--baseline", "bias", "--backend", "torch", "--method", "direct"]
    options += ["--queries", "1:", "--reduce", "l1", "--words", "--top", 3, "-o", tmp_path / "maps"]
    result = run("map", "somewhere", "--file", text, *options)
    assert result.exit_code == 0, result.output
    assert calls == [
        (
            "model somewhere",
            "Grüße",
            {
                "scopes": ["atb", "layer"],
                "layers": [0, -1],
                "queries": slice(1, None),
                "ig": Riemann(50, "midpoint"),
                "value_bias": "separate",
                "baseline": "bias",
                "dtype": torch.float64,
                "backend": "torch",
                "method": "direct",
                "reduce": "l1",
                "groups": "words",
                "keep": TopK(3),
                "tokenizer": tokenizer,
            },
        )
    ]


def test_map_defaults_are_those_of_attribute(calls):
    assert run("map", "m", "text", "--layers", "1:", "--ig", "gauss:16").exit_code == 0
    options = calls[0][2]
    assert (options["scopes"], options["layers"], options["dtype"]) == ("layer", slice(1, None), None)
    assert options["ig"] == GaussLegendre(16)
    assert (options["groups"], options["keep"]) == (None, "dense")
    assert run("map", "m", "text", "--pool", 2).exit_code == 0
    assert calls[1][2]["keep"] == Pool(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either TEXT or --file"),
        (["text", "--file", "f"], "not both"),
        (["  "], "the text is empty"),
        (["--file", "nowhere.txt"], "cannot read 'nowhere.txt'"),
        (["text", "--layers", "first"], "--layers 'first'"),
        (["text", "--layers", "1:2:3"], "--layers '1:2:3'"),
        (["text", "--ig", "simpson"], "--ig 'simpson'"),
        (["text", "--ig", "riemann:x"], "--ig 'riemann:x'"),
        (["text", "--ig", "riemann:5:up"], "'up'"),
        (["text", "--dtype", "float31"], "--dtype 'float31'"),
        (["text", "--top", "2", "--pool", "2"], "--top 2 and --pool 2 are both given"),
        (["text", "--top", "0"], "--top 0: expected at least 1"),
        (["text", "--pool", "-3"], "--pool -3: expected at least 1"),
        (["text", "-o", "nowhere/a.safetensors"], "there is no folder 'nowhere'"),
        (["text", "--png", "nowhere/a.png"], "there is no folder 'nowhere'"),
        (["text", "--html", "nowhere/a.html"], "there is no folder 'nowhere'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(calls, arguments, message):
    fails(2, message, "map", "m", *arguments)
    assert calls == []


def test_a_file_that_is_not_text(calls, tmp_path):
    (tmp_path / "f").write_bytes(b"\xff\xfe\x00")
    fails(2, "is not UTF-8 text", "map", "m", "--file", tmp_path / "f")
