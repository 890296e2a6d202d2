"""Copy passages word for word."""
