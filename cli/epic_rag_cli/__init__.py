"""The `epic-rag` command line: thin modules that parse, call the libraries and print.

`main.py` lists the commands; each module in `commands/` is one of them and imports the heavy libraries inside
its function, so that `--help` and `--version` answer at once.
"""
