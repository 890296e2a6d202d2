"""Samples and the parts that tasks make them of: filler, needles, exact lengths, rows from the hub."""
