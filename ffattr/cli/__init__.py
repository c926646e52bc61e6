"""The command line: ``ffattr map``, ``decide``, ``corpus``, ``analyze``, ``check``, ``models``, ``info``, ``bench``.

In come the texts of arguments and options; out go lines and tables on the terminal, files, and an exit code.

Read
    app.py          the commands about models and this machine, and all commands together
    text_commands.py, table_commands.py             those that read one text, and those that write tables
    options.py      the options that commands share; errors become one line
    output.py       what is printed: lines, cells, JSON, and text that is data in them
    arguments.py    the values that the texts of options stand for
    map.py          the work of ``map``; decide.py, analyze.py, check.py (with ``models``) and bench.py: of the others
    corpus.py       that of ``corpus``, and how far it is
    progress.py     the bar that says how far a computation is
"""

from .app import app, main

__all__ = ["app", "main"]
