"""Walk of the indexed folders: .gitignore and .epicignore, links, safe reading of files."""
