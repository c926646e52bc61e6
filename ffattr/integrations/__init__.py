"""What other tools expect of an attribution, made of `ffattr.contributions`: each module imports the tool it is for.

In come a tool's own objects and arguments; out come its own results. What needs no class of its own is a method of the
results (`Attribution.to_bertviz`) or a line in docs/start.md.

Read
    captum.py   an attribution object as captum's: token ids in, a tensor of the same shape out
    inseq.py    a method that inseq.load_model knows by the name "ffattr"
"""
