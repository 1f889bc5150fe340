"""Indexing: change detection, embedding, and writing to the index."""
