"""Errors that ffattr raises on purpose, as users catch them."""

import pickle
import sys

import pytest
from synthetic import attribution

import ffattr
from ffattr import errors

BUILT_IN = {
    "UnsupportedModel": TypeError,
    "FileFormatError": ValueError,
    "ForwardError": ValueError,
    "NonFiniteError": ValueError,
    "BackendUnavailable": RuntimeError,
    "OutOfMemory": MemoryError,
    "MissingExtra": ImportError,
}
NAMES = sorted(set(errors.__all__) - {"FfattrError"})


@pytest.mark.parametrize("name", NAMES)
def test_every_error_is_caught_as_one_of_ffattr(name):
    with pytest.raises(ffattr.FfattrError, match=r"^layer 3 is off$"):
        raise getattr(errors, name)("layer 3 is off")


@pytest.mark.parametrize(("name", "built_in"), BUILT_IN.items())
def test_errors_of_a_built_in_kind_are_caught_as_that(name, built_in):
    with pytest.raises(built_in):
        raise getattr(errors, name)("a value")


@pytest.mark.parametrize("name", sorted(set(NAMES) - BUILT_IN.keys()))
def test_others_are_no_mistake_in_an_argument(name):
    assert not issubclass(getattr(errors, name), (TypeError, ValueError, LookupError, RuntimeError, OSError))


def test_all_errors_are_public():
    assert all(getattr(ffattr, name) is getattr(errors, name) for name in errors.__all__)
    assert set(errors.__all__) <= set(ffattr.__all__)
    defined = {
        n for n, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert defined == set(errors.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_an_error_comes_back_from_another_process_as_it_was(name):
    found = pickle.loads(pickle.dumps(getattr(errors, name)("layer 3")))
    assert type(found) is getattr(errors, name)
    assert str(found) == "layer 3"


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("pandas", lambda attr: attr.to_pandas()),
        ("pandas", lambda attr: attr.top(3)),
        ("pandas", lambda attr: ffattr.analysis.contextualization_change(attr)),
        ("pandas", lambda attr: ffattr.analysis.alignment(attr)),
        ("xarray", lambda attr: attr.to_xarray("atb")),
        ("matplotlib", lambda attr: attr.plot()),
        ("matplotlib", lambda attr: attr.plot_scopes()),
        ("matplotlib", lambda attr: attr.plot_arcs(2, "atb")),
    ],
)
def test_what_stands_on_an_extra_that_is_not_installed_names_it(monkeypatch, package, use):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ffattr.MissingExtra, match=rf"needs {package}, which is not installed: pip install 'ffattr\[vi"):
        use(attribution())


def test_a_page_stands_on_no_extra(monkeypatch, tmp_path):
    for package in ("pandas", "xarray", "matplotlib"):
        for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
            monkeypatch.setitem(sys.modules, name, None)
    attribution().to_html(tmp_path / "page.html")
    assert "change" in (tmp_path / "page.html").read_text()
