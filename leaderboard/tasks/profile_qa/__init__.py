"""A page about invented people."""
