"""The examples run, and what they print is so."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from paths import BENCHMARKS

from ffattr.analysis import spearman

EXAMPLES = BENCHMARKS / "examples"
NOTEBOOK = EXAMPLES / "tour.ipynb"


def _run(name, *arguments):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_encoder_layer_shows_the_token_that_is_read():
    said = _run("encoder_layer.py")
    assert int(re.search(r"answers right: (\d+) of 200", said)[1]) >= 190
    assert float(re.search(r"layer reproduced to (\S+)", said)[1]) < 1e-5
    found = re.findall(
        r"^(.+?) +the marked token is read most in (\d+) of 200, its mean share is (\S+)", said, re.MULTILINE
    )
    assert [name for name, *_ in found] == ["attention block", "+ feed-forward", "whole layer"]
    for _, times, share in found:
        assert int(times) >= 190
        assert float(share) > 0.8  # by chance: a tenth
    *_, symbols, first, second, third = said.splitlines()
    marked = [symbol.endswith("*") for symbol in re.findall(r"\d\*?", symbols.removeprefix("one of them, * is marked"))]
    for row in (first, second, third):
        shares = torch.tensor([float(share) for share in re.findall(r"\d\.\d+", row)])
        assert abs(float(shares.sum()) - 1) < 0.01
        assert marked.index(True) == int(shares.argmax())


def test_captum_pipeline_compares_what_it_prints(tmp_path):
    said = _run("captum_pipeline.py", tmp_path / "page.html")
    cats, bank = re.split(r"\n(?=\S.*\(nearness)", said.strip())
    for part, strongest in ((cats, "cats"), (bank, "bank")):
        rows = re.findall(r"^(\S+) +(-?\d\.\d{3}) +(\d\.\d{3}) +(\d\.\d{3})$", part, re.MULTILINE)
        words = [row[0] for row in rows]
        gradients, maps, without = torch.tensor([[float(value) for value in row[1:]] for row in rows]).T
        assert not torch.equal(maps, without)
        assert words[int(maps.argmax())] == strongest
        for shares in (maps, without):  # [CLS] and [SEP] have the rest
            assert 0.7 < float(shares.sum()) < 1
        printed = re.findall(r"rank correlation of \|gradients\| and (.+): (\S+)", part)
        for (name, value), shares in zip(printed, (maps, without), strict=True):
            assert abs(float(value) - spearman(gradients.abs(), shares)) < 0.1, name  # of rounded numbers, with ties
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<mark") == 3 * (13 + 8)  # a coloured word for each token, of three attributions


def test_a_family_is_added_and_a_wrong_description_refused():
    said = _run("add_model_family.py")
    assert float(re.search(r"layers reproduced to (\S+)", said)[1]) < 1e-5
    assert "scopes: attn_heads, attn, atb, atb_ln, atb_ln_ff, atb_ln_ff_res" in said
    assert re.search(r"refused: layer 0, batch row 0: .* The 'TinyLlama' adapter does not describe this layer", said)


def test_words_that_made_the_model_say_a_word_add_up_and_are_drawn(tmp_path):
    said = _run("why_this_word.py", tmp_path / "a.png", tmp_path / "a.html")
    parts = said.strip().split("\n\n")
    assert len(parts) == 3
    for part in parts:
        ahead = float(re.search(r"ahead by (\S+)", part)[1])
        assert float(re.search(r"all words and the bias: (\S+)", part)[1]) == ahead > 0
        scores = [abs(float(score)) for score in re.findall(r"^  \S+ +([+-]\d+\.\d+)$", part, re.MULTILINE)]
        assert len(scores) == 4
        assert scores == sorted(scores, reverse=True)
    assert re.search(r"most passes in layer 23: \+\S+ from 'Eiffel' to 'of'", parts[0])  # as the README says
    assert parts[0].splitlines()[1].split()[0] == "Eiffel"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<title>The Eiffel Tower is in the city of …</title>" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_the_notebook_is_stored_as_it_ran():
    """Its outputs are what a code host and the site show: figures, tables, and nothing of the machine that ran it."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    stored = json.loads(text)
    nbformat.validate(stored)
    assert stored["metadata"]["kernelspec"]["name"] == "python3"
    cells = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [(of["output_type"], of.get("name")) for cell in cells for of in cell["outputs"]]
    assert ("stream", "stderr") not in kinds
    assert "error" not in [kind for kind, _ in kinds]
    assert text.count('"image/png"') >= 5
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)
    assert NOTEBOOK.stat().st_size < 1_000_000


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """Code cells by their first line, run, and the folder of what they wrote."""
    folder = tmp_path_factory.mktemp("tour")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # The name "python3" stands for the interpreter that runs this; nothing of the user's settings is read or written.
    with tempfile.TemporaryDirectory() as runtime:  # short: pytest's folders may be too deep for sockets
        own = {"TMPDIR": folder, "IPYTHONDIR": folder, "JUPYTER_CONFIG_DIR": folder}
        environment = {**os.environ, **{name: str(path) for name, path in own.items()}}
        before, os.environ["JUPYTER_RUNTIME_DIR"] = os.environ.get("JUPYTER_RUNTIME_DIR"), runtime
        try:
            client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}})
            client.execute(env=environment)
        finally:
            del os.environ["JUPYTER_RUNTIME_DIR"]
            if before is not None:
                os.environ["JUPYTER_RUNTIME_DIR"] = before
    return notebook, folder


def _outputs(tour, code):
    """Of the cell whose source has ``code``: printed text, and the data of what it showed."""
    notebook, _ = tour
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and code in cell.source)
    printed = "".join(of.text for of in cell.outputs if of.output_type == "stream" and of.name == "stdout")
    return printed, [of.data for of in cell.outputs if of.output_type in ("execute_result", "display_data")]


def test_the_notebook_runs_with_this_interpreter(tour):
    assert "torch.Size([6, 1, 70, 70]) error" in _outputs(tour, 'scopes="all")\nprint(attr')[0]
    assert float(_outputs(tour, 'print(attr["layer"].shape')[0].split("error")[1]) < 1e-5


@pytest.mark.parametrize(
    "code", ["plot_scopes", "plot.change_chart", "plot_amplification", "to_words().plot", "plot_arcs"]
)
def test_the_notebook_shows_figures(tour, code):
    (shown,) = _outputs(tour, code)[1]
    assert len(shown["image/png"]) > 5000


def test_the_notebook_says_what_is_so(tour):
    assert "add up: True" in _outputs(tour, "found.values")[0]
    along = [float(share) for share in re.findall(r"along the output +(\S+)", _outputs(tour, "found.values")[0])]
    assert len(along) == 13
    assert max(along) == along[5] > 0.9  # "soup" itself
    printed, _ = _outputs(tour, "ffattr.TopK(8)")
    assert "128 queries x 512 tokens" in printed
    assert 0.2 < int(re.search(r"8 of 512 tokens are (\d+)%", printed)[1]) / 100 < 0.9
    (shown,) = _outputs(tour, "attr.compare")[1]
    assert len(re.findall(r"^\d ", shown["text/plain"], re.MULTILINE)) >= 6  # a row for each layer
    (words,) = _outputs(tour, "by_word.top(3)")[1]
    assert "archipelago" in words["text/plain"]  # one column: the tokens of a word are added up


def test_the_notebook_writes_its_page(tour):
    (page,) = tour[1].glob("ffattr-*/maps.html")
    text = page.read_text(encoding="utf-8")
    assert "<title>Call me Ishmael</title>" in text
    assert "http://" not in text.replace("http://www.w3.org", "")
