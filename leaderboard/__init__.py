"""Tasks, runner, results and report; installed as ``kvzip_press.leaderboard``."""

if not __name__.startswith("kvzip_press."):
    raise ImportError(
        "import kvzip_press.leaderboard; the bare name 'leaderboard' would load a second copy of every class"
    )
