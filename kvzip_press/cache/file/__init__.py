"""A compressed cache on disk."""
