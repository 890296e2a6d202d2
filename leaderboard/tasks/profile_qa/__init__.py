"""Questions about a page on invented people."""
