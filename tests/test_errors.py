"""Errors that ffattr raises on purpose, as users catch them."""

import pickle

import pytest

import ffattr
from ffattr import errors

BUILT_IN = {
    "UnsupportedModel": TypeError,
    "FileFormatError": ValueError,
    "ForwardError": ValueError,
    "NonFiniteError": ValueError,
    "BackendUnavailable": RuntimeError,
    "OutOfMemory": MemoryError,
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
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined == set(errors.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_an_error_comes_back_from_another_process_as_it_was(name):
    found = pickle.loads(pickle.dumps(getattr(errors, name)("layer 3")))
    assert type(found) is getattr(errors, name)
    assert str(found) == "layer 3"
