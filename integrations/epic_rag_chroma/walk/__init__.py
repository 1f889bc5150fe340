"""The walk: files below the indexed folders, without what .gitignore and .epicignore exclude."""
