"""What may become of the maps: one file for each policy that `ffattr.attribute` takes as ``keep=``.

In come blocks of rows as they are computed, out comes a `Kept`, which `ffattr.results.Attribution` holds and asks.

Read
    policy.py   what every policy has: `Policy` is asked for, its `Sink` takes the rows, a `Kept` stays
    dense.py    `Dense`: whole maps, in memory or in a file
    top.py      `TopK`: the largest entries of every row
    pool.py     `Pool`: means of blocks of tokens
    reduce.py   `Reduce`: what a function made of the rows

`ffattr.results.keep` lists them.
"""
