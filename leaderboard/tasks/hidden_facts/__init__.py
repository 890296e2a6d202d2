"""Facts of one form, hidden in prose."""
