"""The page: one HTML file that shows a run's rows, opened without a network."""

from kvzip_press.leaderboard.report.page import write_report

__all__ = ["write_report"]
