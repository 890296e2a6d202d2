"""The commonest words of a long list."""
