"""Generates tokens from a cache."""
