"""``ffattr decide``: the words, JSON for other programs, files, and what is said of wrong usage."""

import json
import subprocess
import sys

import pytest
import tiny_models
import torch
from commands import HELP, fails, run
from made_tokenizers import make_tokenizer, wordpiece
from saved_models import save_model

import ffattr
from ffattr.cli import decide
from ffattr.models import pretrained

TEXT = "the cat sat on a mat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def writer(folder):
    model = tiny_models.build("gpt2", head="LMHeadModel", dtype=torch.float32)
    return save_model(folder, "gpt2-lm", model)


@pytest.fixture(scope="module")
def classifier(folder):
    model = tiny_models.build("bert", head="ForSequenceClassification", dtype=torch.float32)
    return save_model(folder, "bert-class", model, wordpiece())


def described(*arguments):
    result = run("decide", *arguments, "--json")
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def test_words_are_printed_with_their_scores_and_add_up(writer):
    result = run("decide", writer, TEXT, "--target", "dog", "--contrast", "ran", "--layers")
    assert result.exit_code == 0, result.output
    model, tokenizer = pretrained.load_predictor(str(writer))
    c = ffattr.contributions(model, TEXT, target=("dog", "ran"), tokenizer=tokenizer)
    lines = result.stdout.splitlines()
    assert lines[0] == "what speaks for 'dog - ran', read at 'mat'"
    assert lines[1].strip() == TEXT
    for at, (word, score) in enumerate(zip(TEXT.split(), c.scores[0, 0, 0].tolist(), strict=True)):
        said = f"{score:+.3g}".replace("-", "\u2212")
        assert lines[2 + at].split()[:3] == [str(at), word, said]
    total = next(line for line in lines if "sum" in line).split()[1]
    own = next(line for line in lines if "the model's own number" in line).split()[4]
    assert total == own == f"{float(c.value[0, 0]):+.3g}".replace("-", "\u2212")
    assert sum(line.startswith("\u2502") for line in lines) == len(c.layers) + 1


def test_json_holds_what_the_tensors_hold(writer):
    found = described(writer, TEXT, "--target", "dog", "--position", 2, "--layers")
    model, tokenizer = pretrained.load_predictor(str(writer))
    c = ffattr.contributions(model, TEXT, target="dog", position=2, tokenizer=tokenizer)
    assert [word["word"] for word in found["words"]] == TEXT.split()
    assert [word["score"] for word in found["words"]] == pytest.approx(c.scores[0, 0, 0].tolist(), abs=1e-6)
    assert found["value"] == pytest.approx(float(c.value[0, 0]))
    assert sum(word["score"] for word in found["words"]) + found["bias"] == pytest.approx(found["value"], rel=1e-4)
    assert (found["target"], found["contrast"], found["name"], found["position"]) == ("dog", None, "dog", 2)
    assert found["text"] == TEXT
    assert found["error"] < 1e-4
    assert [one["layer"] for one in found["layers"]] == [*c.layers, None]
    for place, one in enumerate(found["layers"]):
        assert one["scores"] == pytest.approx(c.scores[0, place, 0].tolist(), abs=1e-6)
        assert sum(one["scores"]) + one["bias"] == pytest.approx(found["value"], rel=1e-4)


def test_what_the_model_predicts_is_the_default(writer):
    model, tokenizer = pretrained.load_predictor(str(writer))
    logits = model(**tokenizer(TEXT, return_tensors="pt")).logits[0, -1]
    best = int(logits.argmax())
    found = described(writer, TEXT)
    assert (found["target"], found["name"]) == ("predicted", tokenizer.decode([best]))
    assert found["value"] == pytest.approx(float(logits[best]), rel=1e-4)


def test_a_classifier_has_classes_by_label_or_number_and_words_of_pieces(classifier):
    by_label = described(classifier, "cats playing the cats.", "--target", "LABEL_1")
    assert by_label == {**described(classifier, "cats playing the cats.", "--target", 1), "target": "LABEL_1"}
    assert [word["word"] for word in by_label["words"]] == ["[CLS]", "cats", "playing", "the", "cats", ".", "[SEP]"]
    assert by_label["position"] == -1
    fails(2, "'LABEL_9', which is none of the model's classes", "decide", classifier, "the", "--target", "LABEL_9")


def test_a_masked_model_is_read_at_its_mask(folder):
    model = tiny_models.build("bert", head="ForMaskedLM", dtype=torch.float32)
    tokenizer = make_tokenizer(pad_token="[PAD]", mask_token="</s>")
    masked = save_model(folder, "bert-lm", model, tokenizer)
    assert described(masked, "the cat </s> on a mat")["position"] == 2
    assert described(masked, "the cat </s> on a mat", "--position", "cls")["position"] == 0
    assert described(masked, "the cat sat")["position"] == 2


def test_an_encoder_and_a_decoder_give_together(folder):
    model = tiny_models.build("bart", head="ForConditionalGeneration", dtype=torch.float32)
    found = described(save_model(folder, "bart-lm", model), TEXT, "--target", "dog", "--layers")
    assert [word["stack"] for word in found["words"]] == ["encoder"] * 6 + ["decoder"]
    for scores in ([word["score"] for word in found["words"]], *(one["scores"] for one in found["layers"])):
        assert len(scores) == 7
    assert sum(word["score"] for word in found["words"]) + found["bias"] == pytest.approx(found["value"], rel=1e-3)
    result = run("decide", folder / "bart-lm", TEXT, "--target", "dog")
    assert f"encoder: {TEXT}" in result.stdout


def test_files_are_written(writer, tmp_path):
    files = [tmp_path / name for name in ("a.html", "a.png", "a.safetensors")]
    options = ["--html", files[0], "--png", files[1], "-o", files[2]]
    result = run("decide", writer, TEXT, "--target", "dog", "--flow", *options)
    assert result.exit_code == 0, result.output
    assert f"<title>{writer.parent.name}/{writer.name} (gpt2) ·" in files[0].read_text(encoding="utf-8")
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert ffattr.load(files[2]).flow.shape[-2:] == (6, 6)
    assert [line.split(":")[0] for line in result.stdout.splitlines()[-3:]] == ["contributions", "picture", "page"]
    assert "what passes" not in result.stdout
    assert described(writer, TEXT, "--target", "dog", *options)["words"]  # with the names of files on stderr


def test_by_sentence_scores_add_up_as_by_word(classifier):
    text = "the cats . a cat playing ."
    by_word = described(classifier, text, "--target", "0")
    found = described(classifier, text, "--target", "0", "--sentences")
    assert [one["word"] for one in found["words"]] == ["[CLS]", "the cats.", "a cat playing.", "[SEP]"]
    assert found["value"] == by_word["value"]
    scores = [one["score"] for one in by_word["words"]]
    sums = [scores[0], sum(scores[1:4]), sum(scores[4:8]), scores[8]]
    assert [one["score"] for one in found["words"]] == pytest.approx(sums, rel=1e-5, abs=1e-7)


def test_flow_without_a_file_lists_what_passes_between_words(writer):
    result = run("decide", writer, TEXT, "--target", "dog", "--flow")
    model, tokenizer = pretrained.load_predictor(str(writer))
    flow = ffattr.contributions(model, TEXT, target="dog", tokenizer=tokenizer, flow=True).flow[0, :, 0].clone()
    flow.diagonal(dim1=-2, dim2=-1).zero_()
    layer, to, of = torch.unravel_index(flow.abs().argmax(), flow.shape)
    words = TEXT.split()
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("\u2502")]
    said = f"{float(flow[layer, to, of]):+.3g}".replace("-", "\u2212")
    assert rows[0][1:-1] == [*f"{layer} \u2502 {of} {words[of]} \u2502 {to} {words[to]} \u2502 {said}".split()]


def test_of_many_words_the_strongest_are_listed(writer):
    result = run("decide", writer, " ".join(["the cat sat"] * 9), "--target", "dog")
    assert "15 other words" in result.stdout


def test_colours_are_blue_for_and_orange_against():
    assert decide._choose_style(1.0) == "white on rgb(11,58,107)"
    assert decide._choose_style(-1.0) == "white on rgb(122,49,0)"
    assert decide._choose_style(0.25).startswith("black on rgb(169,203,230)")
    assert decide._choose_style(0.01) == ""
    assert decide._choose_style(7.0) == decide._choose_style(1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either TEXT or --file"),
        (["  "], "the text is empty"),
        (["the", "--position", "first"], "--position 'first': expected a number, cls or mask"),
        (["the", "--html", "nowhere/a.html"], "there is no folder 'nowhere'"),
        (["the", "--png", "nowhere/a.png"], "there is no folder 'nowhere'"),
        (["the", "-o", "nowhere/a"], "there is no folder 'nowhere'"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_loaded(monkeypatch, arguments, message):
    monkeypatch.setattr(pretrained, "load_predictor", lambda name: pytest.fail("loaded"))
    fails(2, message, "decide", "m", *arguments)


def test_what_cannot_be_explained_is_one_line(writer, folder):
    fails(2, "target 'the cat' is 2 tokens", "decide", writer, TEXT, "--target", "the cat")
    fails(2, "position 9 does not exist", "decide", writer, TEXT, "--position", 9)
    fails(2, "has no head and so decides nothing", "decide", save_model(folder, "bert"), TEXT)
    fails(2, "no model at './nowhere'", "decide", "./nowhere", TEXT)


def test_help_loads_no_torch():
    done = subprocess.run([sys.executable, "-c", HELP, "decide", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--contrast" in done.stdout
    assert "LOADED []" in done.stderr
