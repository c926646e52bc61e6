"""All analyses at once: of saved maps, or of a model and a corpus in one pass; as tables and pictures in a folder.

In come an `ffattr.Attribution`, or a model, a tokenizer and texts. Out comes a `Study`, frames by the name of the
analysis and why others are missing; `write` puts studies into a folder.

Read
    frames.py  `Study`, and the analyses that fill it
    tables.py  its frames as Markdown, those that fit a page
    files.py   a folder of CSV files, tables and pictures
    origins.py   which text a row is of, and texts that cannot be read
    evaluate.py  how faithful scores of tokens are to what a model does without these tokens
"""

from .files import check, write
from .frames import Study, add_examples, of_maps, of_model

__all__ = ["Study", "add_examples", "check", "of_maps", "of_model", "write"]
