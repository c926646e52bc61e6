"""One call, from arguments to result: the story of the package. Read this room first.

In come a user's model, inputs and arguments; out come an `Attribution`, `Contributions`, a `Plan` or `Vectors`. Models
and the engine meet here alone.

Read
    attribute.py   `ffattr.attribute`: the whole way in one function
    options.py     its arguments as one value
    scopes.py      names of scopes to scopes; stack.py: what is asked of each stack of layers
    request.py     model, inputs and options, checked once
    read_weights.py    the weights, checked; kept_matrices.py: what is made of them and kept for the next call
    assemble.py    what a layer left in the forward pass -> packs -> engine -> what is kept -> the result
    plan.py, vectors.py, reproduce.py   `ffattr.plan`, `ffattr.vectors`, and how closely a model is reproduced
    contributions.py   `ffattr.contributions`, and toward/, the way back through all layers
    entrance.py        models are taken out of what holds them; parameters that are not finite are named
"""
