"""Pictures: one map, one map per layer or scope, one row as arcs, coloured text, charts of what the analyses measure.

In come tensors with the tokens of their rows and columns, or frames of `ffattr.analysis`. Out come matplotlib figures.
They are made without pyplot: they belong to nobody's global state, need no display and are freed when dropped. Their
text is in the fonts of ``rcParams["font.family"]``; characters that these lack are written as their code points.

Read
    style.py   what all share: text as it is shown, colours and their scales, checks of what is drawn
    heat.py    one map with its tokens, or a small map per layer
    strips.py  a layer's maps component by component, and what each layer amplifies
    arcs.py    one row of a map as arcs
    scores.py  what tokens give to a number: as text, as a sum, through the layers; running_text.py lays the text out
    balance.py the network beside what bypasses it, and beside a norm's gain
    charts.py  frames of the analyses as lines and bars
"""

from .arcs import arcs
from .balance import alignment_chart, gain_chart
from .charts import cancellation_chart, category_bars, change_chart
from .heat import layer_grid, map_figure
from .scores import ScoredText, score_figure
from .strips import amp_strip, scope_strip

__all__ = [
    "ScoredText",
    "alignment_chart",
    "amp_strip",
    "arcs",
    "cancellation_chart",
    "category_bars",
    "change_chart",
    "gain_chart",
    "layer_grid",
    "map_figure",
    "scope_strip",
    "score_figure",
]
