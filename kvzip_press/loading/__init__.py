"""A model by its name."""
