"""What `ffattr.attribute` and `ffattr.contributions` return: numbers, their file, and views as tables, pictures, pages.

In come blocks of rows of the maps as they are computed, and what goes with them: tokens, biases, errors, the plan. Out
come an `Attribution`, or a `StackedAttribution` of an encoder and a decoder, or `Contributions` to a number, and
everything that these show of themselves.

Read
    kept/           what becomes of the rows: one file for each ``keep=`` policy
    keep.py         the policies that there are, and what the argument ``keep`` stands for
    contents.py     the fields of a result, and how its maps are read without padding
    scope_names.py  what the name of a scope says
    attribution.py  `Attribution`: a method for each view, which one of the files below makes
    stacked.py      `StackedAttribution` holds one for each stack of layers; `load` reads any file
    contributions.py  `Contributions`, which have signs; signed/ has its views
    serialise.py    a result as tensors and a description, and back
    files.py        such a file on the disk: whole, or not there; saved/ what it has to hold
    tables.py       pandas and xarray
    comparison.py   two results of the same tokens
    merge_words.py  maps of words made of maps of tokens
    figures.py      pictures
    pages.py        HTML: a page, and what a notebook shows
"""

from .attribution import Attribution
from .stacked import StackedAttribution, load

__all__ = ["Attribution", "StackedAttribution", "load"]
