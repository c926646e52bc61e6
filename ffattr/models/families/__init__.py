"""Families of transformers as data: where in a module tree each part of a layer lives.

Nothing comes in; out comes a table from ``config.model_type`` to a `Family`.

Read
    schema.py   what the data says
    encoders.py, decoders.py, mixtures.py, encoder_decoder.py, own_attention.py   the families
    table.py    all of them
"""
