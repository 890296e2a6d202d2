"""Runs the presses of kvpress (https://github.com/NVIDIA/kvpress) so that their eviction is real.

kvpress is imported when one of its presses is wrapped or asked for by name, not before.
"""

from kvzip_press.presses.kvpress_adapter.ragged_press import RaggedPress

__all__ = ["RaggedPress"]
