"""The layers of a model that no description knows, found by what its modules read and return.

In comes a model; out come its layers, each reproduced by what was found, or why there are none.

Read
    probe.py     small inputs, and the stacks of modules that may be layers
    watch.py, observe.py   one forward pass of the model, watched; the list of layers that attend
    memory.py    layers that attend to tokens that come from outside
    rows.py, match.py, experts.py, refuse.py   which module plays which part, or why none does
    parts.py, specs.py     what was found, and `LayerSpec` made of it
    detect.py    all of it, verified layer by layer
    template.py  a description for a user to finish, where nothing was found
"""
