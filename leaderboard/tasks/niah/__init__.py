"""Needles in a haystack: single, many keys, many values, many keys a question."""
