"""Facts about a model: its structure, identity, devices and chat template."""
