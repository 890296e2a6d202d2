"""From rows to figures: pure functions."""
