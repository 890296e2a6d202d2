"""The pairs of all layers in one pool, in which they compete while a model generates."""
