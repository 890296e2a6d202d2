"""Verses by their addresses."""
