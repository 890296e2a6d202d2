"""Layers that read the keys and values of others (KVSharer), and how they are found."""
