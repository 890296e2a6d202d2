"""Reading a context, scoring it, evicting."""
