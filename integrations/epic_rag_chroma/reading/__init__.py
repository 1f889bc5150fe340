"""Readers: from the bytes of a file to a `Document` of lines, headings and split costs."""
