"""Every kvpress press (https://github.com/NVIDIA/kvpress), made real.

kvpress is imported when a press of it is wrapped or asked for by name, not before.
"""

from kvzip_press.presses.kvpress_adapter.ragged_press import RaggedPress

__all__ = ["RaggedPress"]
