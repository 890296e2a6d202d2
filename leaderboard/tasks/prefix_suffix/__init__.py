"""Find the entry with a given beginning and end."""
