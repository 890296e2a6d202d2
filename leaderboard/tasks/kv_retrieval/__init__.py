"""Values of keys in a long table."""
