"""A needle in essays."""
