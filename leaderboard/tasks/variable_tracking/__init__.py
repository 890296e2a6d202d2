"""Chains of variables that hand on a value."""
