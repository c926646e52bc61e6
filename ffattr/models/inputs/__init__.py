"""What users pass, made into what the model takes, with the text of its tokens and where padding is.

In come texts, ids, conversations, mappings, images, sound or features; out come `Inputs`.

Read
    prepare.py  the entrance
    sequences.py   texts, lists of ids and conversations, side by side
    text.py     token texts; labels.py: in the case of the text
    signals.py  images and sound, whose tokens only the model knows
    readable.py inputs of a list that cannot be read are left out, with the reason
    groups.py   which tokens are added up in a column of the maps
"""
