"""Measured ratios, both sides in one run. Run as ``python -m kvzip_press.leaderboard.benchmarks.<name>``."""
