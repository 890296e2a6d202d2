"""How pairs compete for a budget: one class per allocation, and the short names of some."""

from kvzip_press.budget.allocators.base import SAFEGUARD, Allocation
from kvzip_press.budget.allocators.by_name import ALLOCATIONS, AllocationLike, allocation_of
from kvzip_press.budget.allocators.competing import AdaKV, Global, PerHead, PerLayer
from kvzip_press.budget.allocators.decided import Decided
from kvzip_press.budget.allocators.levels import Levelled
from kvzip_press.budget.allocators.outcome import AboveUniform, Outcome, Threshold, Tolerance
from kvzip_press.budget.allocators.pages import Pages
from kvzip_press.budget.allocators.pyramid import Pyramid
from kvzip_press.budget.allocators.skipping import SkippingLayers
from kvzip_press.budget.allocators.table import Table

__all__ = [
    "ALLOCATIONS",
    "SAFEGUARD",
    "AboveUniform",
    "AdaKV",
    "Allocation",
    "AllocationLike",
    "Decided",
    "Global",
    "Levelled",
    "Outcome",
    "Pages",
    "PerHead",
    "PerLayer",
    "Pyramid",
    "SkippingLayers",
    "Table",
    "Threshold",
    "Tolerance",
    "allocation_of",
]
