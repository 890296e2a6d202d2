"""Exact attention of the tokens of many requests to a pool of packed contexts, each read once for all its tokens."""

from kvzip_press.kernels.context_attention.api import context_attention, plan_contexts
from kvzip_press.kernels.context_attention.plan import ContextPlan
from kvzip_press.kernels.context_attention.turn import Turn

__all__ = ["ContextPlan", "Turn", "context_attention", "plan_contexts"]
