"""The mathematics transposed: in which directions a number that a model computes reads its layers' inputs.

In come a frozen layer, or the frozen head behind the last one, and directions for what it returns; out come those for
what it reads, what passes from token to token on the way, and what comes from no token.

Read
    pieces.py  norms, projections and attention, one by one
    layer.py   a layer's walk in reverse
    head.py    the way from the last hidden states to a logit, and back
"""
