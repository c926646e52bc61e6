"""The work of ``ffattr analyze``: it computes studies, writes them and prints the names of the files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import study
from ..analysis import Categories, pair_categories
from ..models import pretrained
from ..results import Attribution, load
from ..results.contributions import Contributions
from . import arguments
from .progress import show_progress

__all__ = ["analyze_corpus", "analyze_files"]


def analyze_files(files: Sequence[str], folder: Path, top: int, spacy: str | None, formats: Sequence[str]) -> None:
    """Analyzes maps that were saved, each file a model of its own."""
    study.check(folder, formats)
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"no file {file!r}, expected maps that `ffattr map -o` saved (for a model: --corpus)"
            )
    categories = _load_categories(spacy)
    names = _name_files(files)
    made = [
        study.of_maps(name, _load_maps(file), k=top, categories=categories)
        for name, file in zip(names, files, strict=True)
    ]
    _write_studies(made, folder, formats)


def analyze_corpus(
    models: Sequence[str],
    corpus: Path,
    folder: Path,
    top: int,
    spacy: str | None,
    formats: Sequence[str],
    detailed: int,
) -> None:
    """Analyzes a model that reads the lines of ``corpus``."""
    if len(models) != 1:
        raise ValueError(f"--corpus goes with one model, got {len(models)}: {', '.join(models)}")
    study.check(folder, formats)
    # Not by splitlines, which takes a form feed or U+2028 within a text for the end of a line.
    texts = [line.strip() for line in arguments.read_text(None, corpus).split("\n") if line.strip()]
    categories = _load_categories(spacy)
    model, tokenizer = pretrained.load(models[0])
    count = sum(len(ids) for ids in tokenizer(texts)["input_ids"])
    name = Path(models[0]).name or models[0]
    with show_progress(count, Console(stderr=True)) as progress:
        made = study.of_model(
            name, model, texts, tokenizer, k=top, categories=categories, detailed=detailed, progress=progress
        )
    _write_studies([made], folder, formats)


def _write_studies(made: Sequence[study.Study], folder: Path, formats: Sequence[str]) -> None:
    console = Console()
    for path in study.write(made, folder, formats):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
    for one in made:
        for name, why in one.left_out.items():
            line = f"left out: {one.name}, {name.replace('_', ' ')}: {why}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _load_maps(file: str) -> Attribution:
    found = load(file)
    if isinstance(found, Contributions):
        raise ValueError(f"{file!r} holds contributions to a number, expected maps that `ffattr map -o` saved")
    return found


def _name_files(files: Sequence[str]) -> list[str]:
    """Names files as briefly as tells them apart."""
    stems = [Path(file).stem for file in files]
    if len(set(stems)) == len(stems):
        return stems
    return [str(Path(file).with_suffix("")).replace(os.sep, "-") for file in files]


def _load_categories(spacy: str | None) -> Categories:
    if spacy is None:
        return Categories()
    try:
        import spacy as library
    except ImportError:
        raise ValueError("--spacy needs spaCy: pip install spacy") from None
    try:
        nlp: Any = library.load(spacy)
    except OSError as error:
        why, get = str(error).splitlines()[0], f"python -m spacy download {spacy}"
        raise OSError(f"could not load the spaCy pipeline {spacy!r}: {why} Where it has that name: {get}") from error
    pair_categories(["word"], nlp=nlp)  # a pipeline without a parser fails now, and not after the corpus was read
    return Categories(nlp=nlp)
