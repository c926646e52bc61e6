"""Random layers of known shapes: what is timed on them, measured and tuned. Nothing is timed that is not right.

In come a shape of layer, a number of tokens, a dtype and a backend; out go seconds and errors, the rates that plans
predict times by, and the fastest tiles of the Triton kernels.

Read
    cases.py        one random layer with one input
    run.py          its maps by a backend, as `ffattr.attribute` computes them
    operands.py     one call of an operator on random operands of a shape, and how wrong it is
    truth.py        the float64 definition, and how far maps may be from it
    timing.py       seconds of anything; what the machine's own matrix product and memory reach
    compare.py      a row for each backend: seconds and error, or why there are none
    calibrate.py    the rates of this machine (`ffattr.engine.machine_rates`)
    tune.py         the search for the fastest tiles
"""
