"""One forward pass of the user's own model under hooks, and what each layer leaves in it.

In come a description and inputs; out comes a `LayerRecord` of each layer as soon as it has run.

Read
    passes.py           what keeps passes apart that run at the same time
    run.py              the model run as it is, and put back as it was
    proven.py           which models need not be run as they are once more
    attention_hooks.py  queries and keys as attention functions get them; module_hooks.py: experts, and what values read
    user_hooks.py       what hooks of the user change inside layers
    recorder.py         the pass itself
"""
