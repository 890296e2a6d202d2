"""Many users' questions about compressed contexts, each held once: a pool, a folder of contexts, a running batch."""
