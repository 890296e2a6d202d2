"""Runs: from a plan of contexts to rows in a directory."""
