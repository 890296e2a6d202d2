"""Pictures of a run for papers and READMEs: the page's charts as PNGs, and tokens by what was kept of them."""

from kvzip_press.leaderboard.pictures.everything import save_all
from kvzip_press.leaderboard.pictures.pareto import save_pareto
from kvzip_press.leaderboard.pictures.tokens import draw_tokens

__all__ = ["draw_tokens", "save_all", "save_pareto"]
