"""The version, for whatever writes it down, without importing the package."""

__version__ = "0.1.0.dev0"
