"""Comparisons of two sides, both measured in one run: ``python -m kvzip_press.leaderboard.benchmarks.<name>``."""
