"""The work of ``ffattr analyze``: it computes studies, writes them and prints the names of the files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import study
from ..analysis import Categories, pair_categories
from ..models import pretrained
from ..results import Attribution, load
from ..results.contributions import Contributions
from .corpus import require_corpus, show_count
from .output import print_line

__all__ = ["analyze_corpus", "analyze_files"]


def analyze_files(
    files: Sequence[str],
    folder: Path,
    top: int,
    spacy: str | None,
    formats: Sequence[str],
    detailed: int,
    merge: bool = False,
    rolled: bool = False,
) -> None:
    """Analyzes maps that were saved and the tables of corpora, each a model of its own."""
    study.check(folder, formats)
    for file in files:
        if not Path(file).is_file() and not (Path(file) / "_run.json").is_file():
            raise FileNotFoundError(
                f"no file {file!r}, expected maps that `ffattr map -o` saved or the folder of `ffattr corpus -o` (for "
                "a model: --corpus)"
            )
    categories = _load_categories(spacy)
    names = _name_files(files)
    made = []
    for name, file in zip(names, files, strict=True):
        if Path(file).is_dir():
            made.append(_read_tables(name, file, top, detailed, rolled))
        else:
            made.append(study.of_maps(name, _load_maps(file), k=top, categories=categories, rolled=rolled))
    _write_studies(made, folder, formats)
    if merge:
        for file in files:
            for path in require_corpus().merge_parts(file, folder) if Path(file).is_dir() else ():
                print_line(str(path))


def analyze_corpus(
    models: Sequence[str],
    corpus: Path,
    folder: Path,
    top: int,
    spacy: str | None,
    formats: Sequence[str],
    detailed: int,
    rolled: bool = False,
    long: str = "error",
) -> None:
    """Analyzes a model that reads ``corpus``: a run of `ffattr.corpus` in this process, whose tables do not stay."""
    if len(models) != 1:
        raise ValueError(f"--corpus goes with one model, got {len(models)}: {', '.join(models)}")
    study.check(folder, formats)
    if not corpus.exists():
        raise FileNotFoundError(f"cannot read {str(corpus)!r}: there is no such file or folder")
    _load_categories(spacy)  # what fails, fails before the corpus is read
    run_corpus = require_corpus().run_corpus
    with tempfile.TemporaryDirectory() as tables:
        with show_count(Console(stderr=True)) as listen:
            run_corpus(
                *(models[0], [str(corpus)], tables),
                engine="here",
                listen=listen,
                pairs=top,
                spacy=spacy,
                threads=torch.get_num_threads(),
                long="error" if long == "skip" else long,
                max_errors="100%" if long == "skip" else "1%",
            )
        made = _read_tables(Path(models[0]).name or models[0], tables, top, detailed, rolled)
    _write_studies([made], folder, formats)


def _read_tables(name: str, folder: str, top: int, detailed: int, rolled: bool) -> study.Study:
    """Returns what the tables of a corpus say and, unless ``detailed`` is 0, what takes its model and first texts."""
    corpus = require_corpus()
    found: study.Study = corpus.summarize(folder, top)
    found.name = name
    if detailed:
        model, tokenizer = pretrained.load(corpus.read_run(Path(folder)).model)
        corpus.add_first_texts(found, folder, model, tokenizer, detailed, rolled)
    return found


def _write_studies(made: Sequence[study.Study], folder: Path, formats: Sequence[str]) -> None:
    for path in study.write(made, folder, formats):
        print_line(str(path))
    for one in made:
        for name, why in one.left_out.items():
            print_line(f"left out: {one.name}, {name.replace('_', ' ')}: {why}")


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
