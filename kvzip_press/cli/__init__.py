"""The command `kvzip-press`."""
