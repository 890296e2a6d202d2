"""How a model comes to attend to a cache layer of ours."""
