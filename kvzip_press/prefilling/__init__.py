"""Reads a context, scores it and evicts pairs."""
