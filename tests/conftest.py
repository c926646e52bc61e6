"""How tests run: which kernels, how many threads and in which order, and the surroundings that tests ask for by name.

Triton kernels run on the GPU where there is one and in Triton's interpreter elsewhere: decided before any import, and
so are the folders in which compilers keep what they made, by a digest of all that it was made of.
"""

import os
from collections.abc import Iterator
from pathlib import Path

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER is not None:  # of the processes that share the cores each has one thread, and so has all that it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / ".cache" / "triton"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor"))

SLOWEST = (
    "tests/benchmarks/test_resources.py",
    "tests/benchmarks/test_examples.py",
    "tests/ops/triton/test_operator_norms.py",
    "tests/ops/triton/test_ff_norms.py",
    "tests/benchmarks",
    "tests/ops/triton",
    "tests/report/test_page_browser",
    "tests/corpus/test_run_deaths.py",
    "tests/study",
    "tests/engine",
    "tests/models/families",
    "tests/csrc",
)
"""Files and folders of half a minute or more, which several processes begin with: none of them is left to the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(ROOT).as_posix()
        return next((i for i, slow in enumerate(SLOWEST) if path.startswith(slow)), len(SLOWEST))

    if WORKER is not None:
        items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def no_rates_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Makes what was measured on this machine before no part of a test, nor what a test measures a part of another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FFATTR_CACHE", str(tmp_path_factory.mktemp("ffattr-cache")))
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Computes in one thread: small tensors are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills memory from ``torch.empty`` with NaN, so that what a kernel leaves out shows."""
    # On a GPU, cuBLAS would want an environment variable.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def rounded_as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes Triton's interpreter round as GPUs do."""
    from triton_cases import round_as_gpus_do

    round_as_gpus_do(monkeypatch)
