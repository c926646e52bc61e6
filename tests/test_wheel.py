"""What is handed on: the wheel in an environment of its own, away from the checkout, and the source archive.

An environment sees the packages that the tests have, and not the ffattr that they test: nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from saved_models import save_model

import ffattr
from ffattr.ops.library import binary

pytest.importorskip("setuptools", minversion="77")
pytest.importorskip("wheel")

SENTENCE = "the cat sat on a mat"
KERNELS = binary.missing is None


def run(*command: Any, folder: Path, **environment: str) -> str:
    """Returns what a command prints; without what would show it this checkout."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env={**clean, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def make_environment(folder: Path) -> Path:
    """Makes an environment with ``python`` and ``pip`` that has this one's packages behind its own."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder.parent)
    paths = {"base": str(folder), "platbase": str(folder)}
    home = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    home.joinpath("others.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    pip = folder / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\nexec {folder}/bin/python -m pip --disable-pip-version-check "$@"\n')
    pip.chmod(0o755)
    return folder / "bin"


def build(*commands: str, folder: Path, source: Path, kernels: bool) -> Path:
    """Runs setup.py, which leaves nothing in ``source`` but what it compiles; returns the only file that it makes."""
    where = ["egg_info", "--egg-base", str(folder), "build", "--build-lib", str(folder / "lib")]
    switches = {"FFATTR_CPU": "1"} if kernels else {"FFATTR_CPU": "0", "FFATTR_CUDA": "0"}
    run(sys.executable, "setup.py", "--quiet", *where, *commands, folder=source, **switches)
    (made,) = (folder / "dist").iterdir()
    return made


def to_wheel(folder: Path) -> list[str]:
    """Packs what `build` has built: bdist_wheel would build it once more, by other options."""
    return ["bdist_wheel", "--skip-build", "--bdist-dir", str(folder / "tree"), "--dist-dir", str(folder / "dist")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With kernels where these tests have them: what was compiled for them is linked again."""
    folder = tmp_path_factory.mktemp("wheel")
    return build(*to_wheel(folder), folder=folder, source=ROOT, kernels=KERNELS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, unpacked."""
    folder = tmp_path_factory.mktemp("source")
    archive = build("sdist", "--dist-dir", str(folder / "dist"), folder=folder, source=ROOT, kernels=False)
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models"), "bert")


def list_files(wheel: Path) -> set[str]:
    """Names of all files but of the metadata, which lists them."""
    with zipfile.ZipFile(wheel) as packed:
        return {name for name in packed.namelist() if ".dist-info/" not in name}


def check_maps(programs: Path, model: Path, folder: Path) -> None:
    """Maps a sentence with what is installed, which is not this checkout."""
    home = run(programs / "python", "-c", "import ffattr; print(ffattr.__file__)", folder=folder).strip()
    assert Path(home).is_relative_to(programs.parent)
    run(programs / "ffattr", "map", model, SENTENCE, "-o", "maps.safetensors", "--html", "maps.html", folder=folder)
    attr = ffattr.load(folder / "maps.safetensors")
    assert isinstance(attr, ffattr.Attribution)
    assert attr.tokens[0] == SENTENCE.split()
    assert attr["layer"].shape[2:] == (6, 6)
    assert attr.error.max() < 1e-5
    assert "</html>" in (folder / "maps.html").read_text(encoding="utf-8")


def test_the_wheel_is_for_every_python(wheel: Path) -> None:
    tag = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
    assert wheel.name == f"ffattr-{ffattr.__version__}-{tag}.whl"
    names = list_files(wheel)
    assert ("ffattr/libffattr.so" in names) == KERNELS
    assert not [name for name in names if not name.startswith("ffattr/")]
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "ffattr").rglob("*") if path.is_file()}
    ours = {name for name in here if "__pycache__" not in name and not name.endswith(".so")}
    assert names - {"ffattr/libffattr.so"} == ours | {"ffattr/_build_info.py"}


def test_the_wheel_maps_a_sentence(wheel: Path, model: Path, tmp_path: Path) -> None:
    programs = make_environment(tmp_path / "environment")
    run(programs / "pip", "install", "--no-deps", "--no-index", wheel, folder=tmp_path)
    check_maps(programs, model, tmp_path)
    said = run(programs / "ffattr", "info", "--json", folder=tmp_path)
    library = re.search(r'"library": "(.*?)"', said)
    assert (library is not None) == KERNELS
    assert library is None or Path(library[1]).is_relative_to(tmp_path.resolve())


def test_the_lines_of_the_readme_install_the_sources(source: Path, wheel: Path, model: Path, tmp_path: Path) -> None:
    """Literally, in what the source archive holds; all that they ask for is there. Without kernels, to be quick."""
    lines = re.findall(r"^    (pip install .*)$", (source / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) == 2
    programs = make_environment(tmp_path / "environment")
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    for line in lines:
        run("sh", "-c", line, folder=source, PATH=path, PIP_NO_INDEX="1", FFATTR_CPU="0", FFATTR_CUDA="0")
    check_maps(programs, model, tmp_path)
    (home,) = (tmp_path / "environment").rglob("ffattr/__init__.py")
    installed = {
        str(path.relative_to(home.parents[1]))
        for path in home.parent.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert installed == list_files(wheel) - {"ffattr/libffattr.so"}
