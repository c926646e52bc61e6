"""One layer of a loaded model, by its modules, and the parameters read from them when its turn comes.

In comes a module; out comes `LayerWeights` of the decomposition.

Read
    layer.py       `LayerSpec`: which module plays which part
    weights.py     projections; experts.py: those of all experts in one parameter
    norms.py       norms, recognised by their values
    activation.py  activation functions, recognised by their values
    wrapped.py     modules that are offloaded, quantised or wrapped by PEFT
    described.py   a model with all of its layers
"""
