"""Needles in a haystack: single, many keys, many values per key, many keys per question."""
