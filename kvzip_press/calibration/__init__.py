"""Chooses how much a press may remove, by a bound on what changes on a user's own prompts."""
