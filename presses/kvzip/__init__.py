"""KVzip (https://arxiv.org/abs/2505.23416): the pairs to keep are those that the model needs to repeat the context."""

from kvzip_press.presses.kvzip.replay_press import FIRST_PROMPT, NEXT_PROMPT, KVzipPress, local_press

__all__ = ["FIRST_PROMPT", "NEXT_PROMPT", "KVzipPress", "local_press"]
