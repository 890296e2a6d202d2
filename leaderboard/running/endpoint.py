"""Asks a running ``kvzip-press serve`` instead of the model that compresses: its answers are scored as a run's own."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote, urlsplit

from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.decoding.answering import question_ids
from kvzip_press.decoding.generation import eos_ids
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.running.plan import ANSWER, Run, Work
from kvzip_press.press import Press

CONTEXT = "kvzip-press-leaderboard"  # one name: each cache takes the place of the one before
_TIMEOUT = 600.0  # seconds for a request


@dataclass(frozen=True)
class Endpoint:
    """A server that answers.

    Attributes:
        address: Its address, ``http://localhost:8000``.
        model_name: What it calls the model.
        model: The model that compresses; the server has the same weights in the same dtype.
        tokenizer: Its tokenizer.
    """

    address: str
    model_name: str
    model: Any
    tokenizer: Any

    def __post_init__(self) -> None:
        if urlsplit(self.address).scheme not in ("http", "https"):
            raise InvalidArgumentError(
                f"expected the address of a server, such as http://localhost:8000, got {self.address!r:.80}"
            )

    def check(self, run: Run, works: Sequence[Work]) -> None:
        """Raises InvalidArgumentError for a run that a server cannot answer, and if there is none of this model."""
        others = [
            work.sample.sample_id
            for work in works
            if work.sample.multi_turn or not work.sample.context or work.measure != ANSWER
        ]
        if run.batch_size != 1 or others:
            raise InvalidArgumentError(
                "expected single questions about a context each, in batches of 1, for a server, got a batch size of "
                f"{run.batch_size} and {len(others)} samples that are conversations, have no context or are measured "
                "by agreement"
            )
        names = [one.get("id") for one in self._ask("/v1/models").get("data", [])]
        if self.model_name not in names:
            raise InvalidArgumentError(
                f"expected a server of {self.model_name}, got one of {', '.join(map(str, names))}"
            )

    def answers(
        self, cache: RaggedCache, press: Press, texts: Sequence[str], prefixes: Sequence[str], bounds: Sequence[int]
    ) -> list[list[int]]:
        """Returns the ids of the answers to questions about a cache, all asked at once.

        Args:
            cache: The cache of one context, which goes to the server first.
            press: What compressed it.
            texts: The questions.
            prefixes: How each answer begins.
            bounds: Most tokens of each answer.

        Raises:
            InvalidArgumentError: The server refuses the context or a question, or does not answer.
        """
        with TemporaryDirectory(prefix="kvzip-press-") as folder:
            path = Path(folder, "context.safetensors")
            cache.save(path, press=press, model=self.model)
            self._ask(f"/v1/contexts?name={quote(CONTEXT)}", path.read_bytes())
        asked = list(zip(texts, prefixes, bounds, strict=True))
        with ThreadPoolExecutor(max_workers=len(asked)) as pool:
            return list(pool.map(lambda one: self._answer(*one), asked))

    def _answer(self, text: str, prefix: str, bound: int) -> list[int]:
        body = {
            "model": self.model_name,
            "prompt": list(question_ids(self.tokenizer, text, prefix)),
            "max_tokens": bound,
            "temperature": 0,
            "return_token_ids": True,
            "kv_transfer_params": {"context": CONTEXT},
        }
        ids = self._ask("/v1/completions", json.dumps(body).encode())["choices"][0].get("token_ids")
        if not isinstance(ids, list):
            raise InvalidArgumentError("expected a server that returns token ids (vLLM), got an answer without them")
        ended = eos_ids(self.model, self.tokenizer)
        return ids[:-1] if ids and ids[-1] in ended else ids

    def _ask(self, path: str, data: bytes | None = None) -> Any:
        kind = "application/octet-stream" if path.startswith("/v1/contexts") else "application/json"
        request = urllib.request.Request(  # noqa: S310  # http or https, see __post_init__
            self.address.rstrip("/") + path, data=data, headers={"Content-Type": kind}
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:  # noqa: S310
                return json.load(response)
        except urllib.error.HTTPError as error:
            problem = error.read(2000).decode(errors="replace")
            raise InvalidArgumentError(f"{path}: expected an answer, got status {error.code}: {problem}") from error
        except (OSError, ValueError) as error:
            raise InvalidArgumentError(
                f"expected `kvzip-press serve` at {self.address}, got {type(error).__name__}: {error}"
            ) from error
