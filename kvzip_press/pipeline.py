"""The pipeline ``kvzip-press-text-generation``: one context, compressed once, any number of questions.

Importing this module makes the name known to transformers::

    import kvzip_press.pipeline
    from transformers import pipeline

    pipe = pipeline("kvzip-press-text-generation", model=model, tokenizer=tokenizer)
    pipe(context, questions=["Who?", "Where?"], press=KVzipPress(0.7))["answers"]
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForCausalLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from kvzip_press.arguments.ids import described
from kvzip_press.arguments.press import ForeignPress, as_press
from kvzip_press.decoding.answering import ASKED_AT_ONCE, answer
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.chat import encode
from kvzip_press.prefilling.compressed import compress
from kvzip_press.press import Press

logger = logging.getLogger(__name__)

TASK = "kvzip-press-text-generation"


class KVzipPressTextGenerationPipeline(Pipeline):
    """Answers questions about a context through a compressed cache; called like kvpress's pipeline.

    ``pipe(context, question=None, questions=None, answer_prefix="", press=None, compression_ratio=None,
    max_new_tokens=50, max_context_length=None, split_special_tokens=True)``: with one ``question`` (or none: then the
    answer follows the context) it returns ``{"answer": str}``, with a list of ``questions`` ``{"answers": [str,
    ...]}``. The press is one of ours, one of kvpress, or the name of one with ``compression_ratio``; without a press
    nothing is removed. A context longer than ``max_context_length`` tokens is cut at its end, with a warning. Control
    tokens that are spelled out in a text (``<|im_end|>``) are read as ordinary text; with
    ``split_special_tokens=False`` they take effect.
    """

    def _sanitize_parameters(
        self,
        question: str | None = None,
        questions: Sequence[str] | None = None,
        answer_prefix: str | None = None,
        press: Press | ForeignPress | str | None = None,
        compression_ratio: float | None = None,
        max_new_tokens: int = 50,
        max_context_length: int | None = None,
        split_special_tokens: bool = True,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise InvalidArgumentError(f"expected the arguments in the pipeline's docstring, got {sorted(unknown)}")
        if question is not None and questions is not None:
            raise InvalidArgumentError("expected one of question and questions, got both")
        if isinstance(questions, str):
            raise InvalidArgumentError(f"expected questions as a list of texts, got one text: {questions!r:.80}")
        if max_context_length is not None and max_context_length < 1:
            raise InvalidArgumentError(f"expected max_context_length of 1 or more tokens, got {max_context_length}")
        asked = [question or ""] if questions is None else list(questions)
        forward = {
            "questions": asked,
            "answer_prefix": answer_prefix or "",
            "press": as_press("none" if press is None else press, compression_ratio),
            "max_new_tokens": max_new_tokens,
            "split_special_tokens": split_special_tokens,
        }
        reading = {"max_context_length": max_context_length, "split_special_tokens": split_special_tokens}
        return reading, forward, {"single": questions is None}

    def preprocess(self, input_: Any, **parameters: Any) -> dict[str, Any]:
        """Returns the context's token ids, cut to ``max_context_length``."""
        if not isinstance(input_, str):
            raise InvalidArgumentError(f"expected a context as text, got {described(input_)}")
        max_context_length = parameters["max_context_length"]
        ids = encode(self.tokenizer, input_, split_special_tokens=parameters["split_special_tokens"])
        if max_context_length is not None and len(ids) > max_context_length:
            logger.warning("context cut from %d to max_context_length=%d tokens", len(ids), max_context_length)
        return {"context_ids": ids[:max_context_length]}

    def _forward(self, input_tensors: Any, **asked: Any) -> Any:
        return self._answers(input_tensors["context_ids"], **asked)

    def _answers(
        self,
        context_ids: Sequence[int],
        questions: Sequence[str],
        answer_prefix: str,
        press: Press,
        max_new_tokens: int,
        *,
        split_special_tokens: bool,
    ) -> list[str]:
        cache = compress(self.model, self.tokenizer, context_ids, press)
        answers: list[str] = []
        for start in range(0, len(questions), ASKED_AT_ONCE):
            batch = list(questions[start : start + ASKED_AT_ONCE])
            split = split_special_tokens
            answers += answer(
                self.model, self.tokenizer, cache, batch, answer_prefix, max_new_tokens, split_special_tokens=split
            )
        return answers

    def postprocess(self, model_outputs: Any, **parameters: Any) -> dict[str, Any]:
        """Returns ``{"answer": ...}`` for one question, ``{"answers": [...]}`` for a list."""
        return {"answer": model_outputs[0]} if parameters["single"] else {"answers": model_outputs}


PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=KVzipPressTextGenerationPipeline, pt_model=AutoModelForCausalLM
)
