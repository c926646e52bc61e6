"""Maps on one HTML page that needs no network: to look around in, to send to somebody, to print.

In come panels: tokens, and functions that read the map of a scope and layer, or what tokens give to a number. Out come
the pieces of one document, which holds its maps, its style and its program and stays below a number of bytes.

Read
    panels.py  what a page shows, checked
    encode.py  a map as text: quantised, compressed, in base64
    page.py    the document: as finely as the size allows
    drawing.py where the scopes of a layer are
    page.html, style.css, *.js  its parts; decode.js reads what encode.py wrote, main.js starts
"""

from .page import render
from .panels import Panel, Scores

__all__ = ["Panel", "Scores", "render"]
