"""What a layer's maps cost, and how they are computed: before anything is.

Read
    costs.py       operations and bytes of a layer of a shape
    rotation.py    the down matrix with zeros that are left out
    plan.py        what a plan says
    choose.py      which method, in which blocks
"""
