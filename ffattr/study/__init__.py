"""All analyses at once: of saved maps, or of a model and a corpus in one pass; as tables and pictures in a folder."""

from .files import check, write
from .frames import Study, of_maps, of_model

__all__ = ["Study", "check", "of_maps", "of_model", "write"]
