"""Maps on one HTML page that needs no network: to look around in, to send to somebody, to print."""

from .page import render
from .panels import Panel

__all__ = ["Panel", "render"]
