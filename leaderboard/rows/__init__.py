"""The rows that a run writes, and their files."""
