"""What makes a saved file one that can be relied on, whoever wrote it and whatever happened to it since.

In come the tensors and the description of a file; out comes nothing, or a `FileFormatError` that says what is wrong.

Read
    checksum.py   a number by which damage of any kind shows
    write.py      tensors and text into a file that is there
    schema.py     what a file has to hold, and in which shapes and dtypes
"""
