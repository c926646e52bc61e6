"""Maps of one layer of a pack of sequences, without a tensor ``[T, T, d]``. Knows tensors alone: no model, no result.

In come `LayerWeights`, sequences with their attention, scopes, and how to compute (`EngineOptions`); out go complete
rows of maps, block after block, and the layer's recomputed output.

Read
    pack.py             sequences side by side, blocks of their queries
    planning/           what a layer costs, which method, in which blocks; machine_rates.py: how fast this machine is
    query_pass.py       the queries' own way through the layer
    key_tokens.py       what keys bring to each point of it; key_blocks.py: keys, or groups of them, as columns
    attention_maps.py   scopes before the feed-forward block, by quadratic forms or sums of vectors
    ff_operands.py      what the operators want of a feed-forward block
    ff_maps.py          scopes behind it, by the operators; pair_vectors.py: by a vector for each of few pairs
    layer_maps.py       all of it for a block of queries
    run.py              one block after the other, in smaller ones where memory runs out
"""
