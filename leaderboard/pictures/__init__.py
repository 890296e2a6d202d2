"""Pictures of a run for papers and READMEs: the page's charts as PNGs."""

from kvzip_press.leaderboard.pictures.everything import save_all
from kvzip_press.leaderboard.pictures.pareto import save_pareto

__all__ = ["save_all", "save_pareto"]
