"""Multi-round coreference: repeat one answer out of a long conversation."""
