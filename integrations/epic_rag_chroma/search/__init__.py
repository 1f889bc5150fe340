"""Search: vectors, keywords, fusion, filters, deduplication and reranking."""
