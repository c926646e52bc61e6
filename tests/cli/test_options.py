import pytest
from commands import fails, run

from ffattr.errors import ArchitectureMismatch, BackendUnavailable, OutOfMemory, UnsupportedModel
from ffattr.pipeline import attribute as attribute_module


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnsupportedModel("no adapter for [bold]x[/bold],\n known: bert"), 2),
        (ArchitectureMismatch("layer 3 is off"), 1),
        (BackendUnavailable("no GPU"), 1),
        (OutOfMemory("layer 3 ran out of memory"), 1),
        (ZeroDivisionError("a bug"), 1),
        (KeyError("no scope 'x'"), 2),
        (MemoryError(), 1),
    ],
)
def test_errors_are_one_line(calls, monkeypatch, error, code):
    def attribute(*_, **__):
        raise error

    monkeypatch.setattr(attribute_module, "attribute", attribute)
    text = " ".join(str(error.args[0]).split()) if error.args else "MemoryError"
    fails(code, text, "map", "m", "text")
    result = run("map", "m", "text", "--debug")
    assert result.exception is error
