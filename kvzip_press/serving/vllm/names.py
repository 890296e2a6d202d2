"""vLLM's hook that looks at a request before the engine does: a name that cannot be answered is an error of the client.

It is a logits processor that processes nothing, because those are asked whether they accept a request's parameters.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor

from kvzip_press.serving.vllm.requests import check_request


class ContextNames(LogitsProcessor):
    """Accepts requests whose context can be read."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises InvalidArgumentError, a ValueError, which vLLM answers with status 400."""
        check_request(sampling_params)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what vLLM gives and needs nothing of it."""

    def apply(self, logits: Any) -> Any:
        """Returns the logits as they are."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """Returns True: nothing is changed."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Does nothing."""
