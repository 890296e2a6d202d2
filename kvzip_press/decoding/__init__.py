"""Writing behind a cache."""
