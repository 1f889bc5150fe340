"""One module a command; `epic_rag_cli.main` lists them."""
