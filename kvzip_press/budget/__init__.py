"""From scores to keep masks: knows no cache and no model."""
