"""Pictures: one map, one map per layer or scope, one row of a map as arcs, charts of what the analyses measure.

Figures are made without pyplot: they belong to nobody's global state, need no display and are freed when dropped.
Their text is in the fonts of matplotlib's ``rcParams["font.family"]``; characters that these lack are written as their
code points.
"""

from .arcs import arcs
from .charts import cancellation_chart, category_bars, change_chart
from .heat import layer_grid, map_figure
from .strips import amp_strip, scope_strip

__all__ = [
    "amp_strip",
    "arcs",
    "cancellation_chart",
    "category_bars",
    "change_chart",
    "layer_grid",
    "map_figure",
    "scope_strip",
]
