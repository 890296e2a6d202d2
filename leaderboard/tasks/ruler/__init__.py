"""RULER as kvpress hosts it."""
