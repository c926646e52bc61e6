"""Analyses that take the decomposed vectors themselves, of `ffattr.vectors`, and not only their norms.

Read
    mixing.py        how much of a token's vector comes from the others
    cancellation.py  which dimensions the effects of the feed-forward block lie in, and how long its vectors are
    gain.py          the norm's gain beside what the network writes, dimension by dimension
    globenc.py       the maps that GlobEnc multiplies
"""

from .cancellation import cancellation, ff_energy, norm_balance
from .gain import gain_balance
from .globenc import globenc_maps
from .mixing import mixing_ratio

__all__ = ["cancellation", "ff_energy", "gain_balance", "globenc_maps", "mixing_ratio", "norm_balance"]
