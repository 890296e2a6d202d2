"""Metrics. Each takes a prediction and the accepted answers, and gives a number in [0, 1].

`words` are this project's own, of the generated tasks; `originals` are those of the benchmarks that come from the hub,
`code` (RepoQA) and `mathematics` (AIME, MATH) among them.
"""

from kvzip_press.leaderboard.metrics.words import (
    exact_match,
    fraction_found,
    normalise,
    substring_match,
    token_f1,
    words_in_order,
)

__all__ = ["exact_match", "fraction_found", "normalise", "substring_match", "token_f1", "words_in_order"]
