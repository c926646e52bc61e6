"""Toward a number that a model computes: what is asked, where the model reads it, and the way back through its layers.

Read
    targets.py     what a user asks: which logits or directions, at which positions
    read_head.py   the model's own numbers, and the head that they are read by
    walk_back.py   one sequence from its last layer to its first
"""
