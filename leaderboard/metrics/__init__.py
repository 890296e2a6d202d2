"""Metrics: each takes a prediction and the accepted answers, and returns a number in [0, 1].

`words` holds this project's own metrics, for the generated tasks. `originals`, `code` (RepoQA) and `mathematics` (AIME,
MATH) hold those of the benchmarks that come from the hub.
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
