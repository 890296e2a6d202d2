"""Functions of Python's standard library, by what they do."""
