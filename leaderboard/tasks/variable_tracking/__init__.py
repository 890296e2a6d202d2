"""Follow chains of variables that pass on a value."""
