"""Storage of an index: layout of the folder, state, database, Chroma collection and server."""
