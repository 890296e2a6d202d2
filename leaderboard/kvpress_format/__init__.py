"""Reads and writes folders of results as kvpress's evaluation writes them and its leaderboard takes them.

There is one folder per press and ratio, named ``dataset__data_dir__model__press__ratio`` (two decimals, followed by
``__query_aware`` if the run is). It holds ``predictions.csv`` (one line per question), ``metrics.json`` (100 times the
mean score of each task) and ``config.yaml`` (the settings of the evaluation). Whatever else our rows hold goes into
further columns and a fourth file, ``kvzip_press.json``, so that rows come back as they were; results written by kvpress
itself lack that file.
"""

from kvzip_press.leaderboard.kvpress_format.exporting import export_rows
from kvzip_press.leaderboard.kvpress_format.importing import import_rows

__all__ = ["export_rows", "import_rows"]
