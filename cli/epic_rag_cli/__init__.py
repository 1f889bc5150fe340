"""The `epic-rag` command line.

`main.py` lists the commands. Each function in `commands/` parses its options, calls one method of the libraries and
prints. It imports them inside the function, so that `--help` and `--version` answer at once.
"""
