"""All analyses at once: of saved maps, or of a model and a corpus in one pass; as tables and pictures in a folder."""

from .files import write
from .frames import Study, of_maps, of_model

__all__ = ["Study", "of_maps", "of_model", "write"]
