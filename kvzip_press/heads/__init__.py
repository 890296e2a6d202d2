"""Keeps or drops whole heads, by one score each."""
