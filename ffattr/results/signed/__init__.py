"""What a person sees of `Contributions`: tables, words, pictures, pages.

In come the numbers of `ffattr.contributions`, as `contents.SignedContents` holds them. Nothing here is computed from a
model: scores are told by their boundary, put side by side with what comes from no token, and named.

Read
    contents.py  the fields, what the boundaries are called, and the texts that give to a number
    tables.py    a tidy table, and the strongest tokens
    words.py     tokens added up to words
    figures.py   pictures
    pages.py     the page to look around in, and what a notebook shows
"""
