"""`python -m epic_rag_cli` runs `epic-rag`."""

from epic_rag_cli.main import main

if __name__ == "__main__":
    main()
