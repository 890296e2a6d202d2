"""Ragged attention to pairs that are stored as codes, read as they lie."""
