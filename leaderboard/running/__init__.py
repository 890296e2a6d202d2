"""From a plan to rows: runs, and what they are made of."""
