"""Compressed caches: packed pairs, the tail that grows after them, and their files."""
