"""Conversations of people with coding agents."""
