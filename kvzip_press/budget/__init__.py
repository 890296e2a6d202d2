"""Turns scores into keep masks, without knowing caches or models."""
