"""Find the most common words of a long list."""
