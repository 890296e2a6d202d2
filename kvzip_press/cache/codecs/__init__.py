"""How keys and values of kept pairs lie in memory: one storage a file, behind one door."""
