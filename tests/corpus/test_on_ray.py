"""Ray actors give the bytes that processes give, also when one is killed.

`make test-ray` runs this, with no other tests beside it.
Starting Ray takes a quarter of a minute, and actors import what processes have: one cluster for all tests. Where Ray is
not installed, or its cluster does not start in time, they are skipped.
"""

import os
import signal
import sys

import corpora
import pytest
from corpora import read_tree
from corpora_page import find_block, list_commands, make_surroundings

from ffattr.corpus import run as run_module
from ffattr.corpus import run_corpus
from ffattr.corpus.on_ray import RayActors

if not os.environ.get("FFATTR_TEST_RAY"):
    pytest.skip("Ray is tested by `make test-ray`", allow_module_level=True)
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ffattr[ray]'")

STARTED = 180  # seconds in which the cluster has to run a first task
PATIENCE = 900  # seconds of all tests here together, on a machine that is busy with others
SLOW = {
    "agent_register_timeout_ms": "600000",
    "worker_register_timeout_seconds": "600",
    "health_check_timeout_ms": "60000",
    "gcs_server_request_timeout_seconds": "300",
}
"""Ray takes a process that does not answer within 20 s or a minute for dead, which on such a machine it is not."""


@pytest.fixture(scope="module", autouse=True)
def cluster(surroundings):
    """Starts Ray once, where actors find the package and the helpers of tests, and ends all in time."""

    def give_up(number, frame):
        raise TimeoutError("Ray took too long")

    handler = signal.signal(signal.SIGALRM, give_up)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(surroundings)
        patch.setenv("PYTHONPATH", os.pathsep.join(os.path.abspath(one) for one in sys.path if one))
        for name, value in SLOW.items():
            patch.setenv(f"RAY_{name}", value)
        try:
            signal.alarm(STARTED)
            try:
                ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, object_store_memory=80 * 2**20)
                ray.get(ray.remote(lambda: None).remote())
            except (OSError, RuntimeError, ray.exceptions.RayError) as error:  # of which TimeoutError is one
                pytest.skip(f"no Ray cluster started within {STARTED} s: {type(error).__name__}: {error}")
            signal.alarm(PATIENCE)
            yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, handler)
            ray.shutdown()


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    make_surroundings(folder)
    return folder


def test_an_actor_that_is_killed_in_the_middle(compute, undisturbed, tmp_path, monkeypatch):
    """G2, G3."""
    engines = []

    def open_engine(name, folder, workers, run):
        engines.append(RayActors(folder, workers, run.options.threads, corpora.WorkerThatDiesOnce))
        return engines[-1]

    monkeypatch.setattr(run_module, "open_engine", open_engine)
    compute(tmp_path, engine="ray")
    assert [engine.slots for engine in engines] == [2]
    assert (tmp_path / "_died-batch").exists()
    assert read_tree(tmp_path) == read_tree(undisturbed)
    assert ray.is_initialized()  # it was here before


def test_the_command_of_the_page(surroundings):
    """The run of a command by Ray, here as a call: two actors, and an error of a worker that comes back whole."""
    (arguments,) = [arguments for arguments in list_commands() if "ray" in arguments]
    assert arguments == ["corpus", "MODEL", "texts.txt", "-o", "on-ray", "--engine", "ray"]
    found = run_corpus("MODEL", ["texts.txt"], "on-ray", engine="ray", workers=1)
    assert (found.documents, found.errors) == (10, 0)
    run_corpus("MODEL", ["texts.txt"], "here", engine="here")
    assert read_tree(surroundings / "on-ray") == read_tree(surroundings / "here")


def test_an_error_of_an_actor_ends_the_run(compute, tmp_path, monkeypatch):
    monkeypatch.setattr(
        run_module, "open_engine", lambda name, folder, workers, run: RayActors(folder, 1, 1, corpora.WorkerThatFails)
    )
    with pytest.raises(OSError, match="No space left on device"):
        compute(tmp_path, engine="ray")


def test_the_mapper_in_ray_data(surroundings):
    import pyarrow.parquet as pq

    exec(find_block("python", "import ray").replace('"MODEL"', repr(str(surroundings / "MODEL"))), {})
    found = pq.read_table(surroundings / "found").to_pylist()
    assert [row["error_type"] for row in found] == [None] * 3 + [None]
    assert [len(row["pairs"]) for row in found] == [60] * 4
