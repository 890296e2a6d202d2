"""Multi-round coreference: one answer out of a long conversation, given again."""
