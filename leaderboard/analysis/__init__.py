"""Pure functions from rows to cells, comparisons, curves and maps."""
