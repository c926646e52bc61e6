"""Ray actors give the bytes that processes give, also when one is killed.

Starting Ray takes a minute and a half on two cores: ``FFATTR_TEST_RAY=1`` asks for it, where Ray is installed.
"""

import os
import sys

import corpora
import pytest
from corpora import read_tree

if not os.environ.get("FFATTR_TEST_RAY"):
    pytest.skip("Ray is tested with FFATTR_TEST_RAY=1", allow_module_level=True)
ray = pytest.importorskip("ray")

from ffattr.corpus import run as run_module  # noqa: E402
from ffattr.corpus.on_ray import RayActors  # noqa: E402


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # actors find the helpers of tests
    ray.init(num_cpus=1, log_to_driver=False, include_dashboard=False, object_store_memory=80 * 2**20)
    yield
    ray.shutdown()


def test_an_actor_that_is_killed_in_the_middle(cluster, compute, undisturbed, tmp_path, monkeypatch):
    """G2, G3."""
    engines = []

    def open_engine(name, folder, workers, run):
        engines.append(RayActors(folder, workers, run.options.threads, corpora.WorkerThatDiesOnce))
        return engines[-1]

    monkeypatch.setattr(run_module, "open_engine", open_engine)
    compute(tmp_path, engine="ray")
    assert [engine.slots for engine in engines] == [1]
    assert (tmp_path / "_died-batch").exists()
    assert read_tree(tmp_path) == read_tree(undisturbed)
