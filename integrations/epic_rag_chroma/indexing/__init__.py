"""Indexing runs: change detection, embedding, and writing to the store."""
