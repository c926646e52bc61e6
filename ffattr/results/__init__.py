"""What `ffattr.attribute` returns: its maps, their file, and their views as tables, pictures and pages."""

from .attribution import Attribution
from .stacked import StackedAttribution, load

__all__ = ["Attribution", "StackedAttribution", "load"]
