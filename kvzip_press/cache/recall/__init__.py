"""Recall: nothing is evicted, and a decode step reads only those pairs that its query ranks first."""
