"""Makes a model attend to the cache layers of this package."""
