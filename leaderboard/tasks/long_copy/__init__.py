"""Passages that are copied word for word."""
