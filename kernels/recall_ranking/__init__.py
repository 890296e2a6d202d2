"""From the queries of a step to the list of the pairs that it reads: groups are ranked, the best fill a budget."""

from kvzip_press.kernels.recall_ranking.api import recall_ranking

__all__ = ["recall_ranking"]
