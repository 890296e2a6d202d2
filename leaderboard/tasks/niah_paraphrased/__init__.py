"""Needles that are asked for in other words."""
