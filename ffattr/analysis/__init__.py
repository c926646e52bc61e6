"""What the maps say: analyses of an `ffattr.Attribution`, of its rows while they are computed, or of vectors.

In come the maps of one stack of layers, blocks of their rows (`ffattr.Reduce` hands them to a collector), or
`ffattr.Vectors`. Out come tidy pandas frames, one row for each thing that was measured. No model is needed.

Read
    rows.py            what is read of maps, rows and vectors, and what the names of scopes say
    change.py          how much each component rearranges the map
    change_sample.py   the same from a sample of pairs, without maps
    ranks.py           the rank correlation behind both
    amplification.py   FF-amp, and the pairs that the feed-forward network amplifies most
    words.py           the words that tokens make up
    categories.py      what kind of pair two tokens are
    category_rates.py  how much more often amplified pairs are of a category
    token_summary.py   what every token takes and gives
    rollout.py         maps multiplied through the layers
    alignment.py       whether the network undoes what bypasses it: the angle between the two
    of_vectors/        analyses that take the vectors themselves: mixing, and which dimensions effects lie in
    several.py         several collectors in one pass
"""

from .alignment import Alignment, alignment
from .amplification import AmplifiedPairs, amplified_pairs, ff_amp, ff_amp_maps
from .categories import Categories, pair_categories
from .category_rates import category_rates
from .change import contextualization_change
from .change_sample import ChangeSample
from .of_vectors import cancellation, ff_energy, gain_balance, globenc_maps, mixing_ratio, norm_balance
from .ranks import spearman
from .rollout import rollout, rollout_maps
from .several import Several
from .token_summary import TokenSummary, token_summary

__all__ = [
    "Alignment",
    "AmplifiedPairs",
    "Categories",
    "ChangeSample",
    "Several",
    "TokenSummary",
    "alignment",
    "amplified_pairs",
    "cancellation",
    "category_rates",
    "contextualization_change",
    "ff_amp",
    "ff_amp_maps",
    "ff_energy",
    "gain_balance",
    "globenc_maps",
    "mixing_ratio",
    "norm_balance",
    "pair_categories",
    "rollout",
    "rollout_maps",
    "spearman",
    "token_summary",
]
