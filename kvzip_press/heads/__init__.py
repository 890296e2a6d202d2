"""Whole heads: kept or dropped by one score each."""
