"""Families of transformers as data: where in a module tree each part of a layer lives.

Nothing comes in; out comes a table from ``config.model_type`` to a `Family`.

Read
    schema.py   what the data says
    encoders.py, decoders.py, encoder_decoder.py, own_attention.py   the families
    mixtures.py, shared_experts.py, latent.py   those with experts; with latent attention
    table.py    all of them
"""
