"""The version, in a module of its own, for code that records it without importing the whole package."""

__version__ = "0.1.0.dev0"
