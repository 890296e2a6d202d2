"""Loads a model by its name."""
