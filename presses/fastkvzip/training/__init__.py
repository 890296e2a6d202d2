"""Trains gates with KVzip as the teacher: features are kept on disk, and all layers learn at once."""

from kvzip_press.presses.fastkvzip.training.evaluation import Agreement, evaluate
from kvzip_press.presses.fastkvzip.training.recipe import Recipe
from kvzip_press.presses.fastkvzip.training.run import Training
from kvzip_press.presses.fastkvzip.training.source import self_generated, texts_of

__all__ = ["Agreement", "Recipe", "Training", "evaluate", "self_generated", "texts_of"]
