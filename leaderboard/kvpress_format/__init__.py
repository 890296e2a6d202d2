"""Reads and writes folders of results as kvpress's evaluation writes them and its leaderboard takes them.

There is one folder per press and ratio, named ``dataset__data_dir__model__press__ratio`` (two decimals, or a threshold
or a ratio of heads in its place; behind it whatever else the evaluation was told, such as ``query_aware``). Of folders
with one name, the second goes into the first as ``1``, and so on. A folder holds ``predictions.csv`` (one line per
question), ``metrics.json`` (100 times the mean score of each task) and ``config.yaml`` (the settings of the
evaluation). Whatever else our rows hold goes into further columns and a fourth file, ``kvzip_press.json``, so that rows
come back as they were; results written by kvpress itself lack that file.
"""

from kvzip_press.leaderboard.kvpress_format.board import notes_for_board
from kvzip_press.leaderboard.kvpress_format.exporting import data_sets_of, export_rows
from kvzip_press.leaderboard.kvpress_format.importing import import_rows

__all__ = ["data_sets_of", "export_rows", "import_rows", "notes_for_board"]
