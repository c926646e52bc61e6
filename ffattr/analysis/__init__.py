"""What the maps say: analyses of an `ffattr.Attribution`, of its rows while they are computed, or of vectors.

All return tidy pandas frames, one row for each thing that was measured.
"""

from .change import contextualization_change
from .ranks import spearman
from .sample import ChangeSample

__all__ = ["ChangeSample", "contextualization_change", "spearman"]
