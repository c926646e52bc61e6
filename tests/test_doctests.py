"""Every public function has an example in its docstring, and every example runs."""

import doctest
import importlib
import inspect
import pkgutil

import documented
import pytest

import ffattr

KERNELS = ("ffattr.ops.triton", "ffattr.libffattr", "ffattr._build_info", "ffattr.__main__")
OTHERS = ("ffattr.integrations.inseq",)  # imports what it is for
MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(ffattr.__path__, "ffattr.")
    if not found.name.startswith((*KERNELS, *OTHERS))
)
PUBLIC = ("ffattr", "ffattr.analysis", "ffattr.plot", "ffattr.report", "ffattr.study")


@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    """Examples may write files."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("in_a_folder")
@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS, verbose=False)
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, globs=dict(documented.namespace())):
        said = []
        assert runner.run(example, out=said.append, clear_globs=False).failed == 0, "".join(said)


def _public():
    """Functions, classes, and methods of classes with their classes."""
    for home in PUBLIC:
        module = importlib.import_module(home)
        for name in module.__all__:
            thing = getattr(module, name)
            if not callable(thing) or (inspect.isclass(thing) and issubclass(thing, Exception)):
                continue
            yield pytest.param(thing, None, id=f"{home}.{name}")
            for method, member in inspect.getmembers(thing) if inspect.isclass(thing) else ():
                ours = getattr(member, "__module__", "") or ""
                if callable(member) and not method.startswith("_") and ours.startswith("ffattr"):
                    yield pytest.param(member, thing, id=f"{home}.{name}.{method}")


@pytest.mark.parametrize(("thing", "owner"), list(_public()))
def test_what_is_public_has_an_example(thing, owner):
    """A method may be shown by its class."""
    assert ">>>" in (thing.__doc__ or "") + (getattr(owner, "__doc__", None) or ""), f"{thing} has no example"
