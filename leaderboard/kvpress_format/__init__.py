"""Folders of results as kvpress's evaluation writes them and its leaderboard takes them, read and written.

A folder a press and ratio, named ``dataset__data_dir__model__press__ratio`` (two decimals; ``__query_aware`` behind it
where that is so), with ``predictions.csv`` (a line a question), ``metrics.json`` (hundred times the mean score of each
task) and ``config.yaml`` (the settings of the evaluation). What our rows know beyond that stands in further columns and
in a fourth file, ``kvzip_press.json``, so that rows come back as they were; results that kvpress itself wrote lack it.
"""

from kvzip_press.leaderboard.kvpress_format.exporting import export_rows
from kvzip_press.leaderboard.kvpress_format.importing import import_rows

__all__ = ["export_rows", "import_rows"]
