"""What the maps say: analyses of an `ffattr.Attribution`, of its rows while they are computed, or of vectors.

All return tidy pandas frames, one row for each thing that was measured.
"""

from .amplification import AmplifiedPairs, amplified_pairs, ff_amp, ff_amp_maps
from .cancellation import cancellation, ff_energy, norm_balance
from .categories import Categories, pair_categories
from .category_rates import category_rates
from .change import contextualization_change
from .change_sample import ChangeSample
from .mixing import mixing_ratio
from .ranks import spearman
from .rollout import rollout, rollout_maps
from .several import Several
from .token_summary import TokenSummary, token_summary

__all__ = [
    "AmplifiedPairs",
    "Categories",
    "ChangeSample",
    "Several",
    "TokenSummary",
    "amplified_pairs",
    "cancellation",
    "category_rates",
    "contextualization_change",
    "ff_amp",
    "ff_amp_maps",
    "ff_energy",
    "mixing_ratio",
    "norm_balance",
    "pair_categories",
    "rollout",
    "rollout_maps",
    "spearman",
    "token_summary",
]
