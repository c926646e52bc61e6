"""A model and a corpus in files, and the tables of it that nothing disturbed."""

import corpora
import pytest
import torch

pytest.importorskip("pyarrow")
pytest.importorskip("filelock")

from ffattr.corpus import run_corpus
from ffattr.engine import machine_rates
from ffattr.models import pretrained

REAL_LOAD = pretrained.load


@pytest.fixture(autouse=True)
def this_process_as_before():
    """Undoes what a worker in this process sets for good."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    machine_rates.pin(None)


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory):
    return str(corpora.save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def loaded(saved_model):
    return REAL_LOAD(saved_model)


@pytest.fixture(autouse=True)
def load_once(monkeypatch, loaded, saved_model):
    """Loads that model once for all workers in this process."""
    monkeypatch.setattr(pretrained, "load", lambda name: loaded if name == saved_model else REAL_LOAD(name))


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "texts.txt"
    path.write_text("\n".join(corpora.TEXTS) + "\n")
    return str(path)


@pytest.fixture
def compute(saved_model, corpus_file):
    """Runs the corpus into a folder, in this process if no other engine is named."""

    def run(folder, **options):
        options = {"engine": "here", "shard_docs": 4, "keep": corpora.EVERY_TABLE, "batch_tokens": 24, **options}
        return run_corpus(saved_model, [corpus_file], folder, **options)

    return run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, saved_model, corpus_file):
    """Returns the folder of a whole run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    options = {"engine": "here", "shard_docs": 4, "keep": corpora.EVERY_TABLE, "batch_tokens": 24}
    run_corpus(saved_model, [corpus_file], folder, **options)
    return folder
