"""The pipeline is called as kvpress's is, and answers what compress and answer give."""

from __future__ import annotations

import pytest
from transformers import pipeline

import kvzip_press.pipeline  # registers the name
from kvzip_press import KVzipPress, answer, compress
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.pipeline import TASK, KVzipPressTextGenerationPipeline
from kvzip_press.testing import ByteTokenizer, tiny_model

CONTEXT = "The key of the red box is under the mat, and the mat is at the door."


@pytest.fixture(scope="module")
def pipe() -> KVzipPressTextGenerationPipeline:
    model = tiny_model()
    model.generation_config.eos_token_id = None
    return KVzipPressTextGenerationPipeline(model=model, tokenizer=ByteTokenizer())


def test_questions_are_answered_from_one_compressed_cache(pipe) -> None:
    """A list of questions gives a list of answers, one question one answer."""
    press = KVzipPress(0.6)
    cache = compress(pipe.model, pipe.tokenizer, CONTEXT, press)
    expected = [answer(pipe.model, pipe.tokenizer, cache, q, max_new_tokens=6) for q in ("Where?", "Who?")]
    assert pipe(CONTEXT, questions=["Where?", "Who?"], press=press, max_new_tokens=6) == {"answers": expected}
    assert pipe(CONTEXT, question="Who?", press=press, max_new_tokens=6) == {"answer": expected[1]}


def test_many_questions_are_asked_in_batches_and_none_gives_no_answer(pipe, monkeypatch) -> None:
    monkeypatch.setattr(kvzip_press.pipeline, "ASKED_AT_ONCE", 2)
    questions, press = [f"Is it {number * 37}?" for number in range(5)], KVzipPress(0.6)
    alone = [pipe(CONTEXT, question=question, press=press, max_new_tokens=6)["answer"] for question in questions]
    assert len(set(alone)) > 1
    assert pipe(CONTEXT, questions=questions, press=press, max_new_tokens=6) == {"answers": alone}
    assert pipe(CONTEXT, questions=[], press=press) == {"answers": []}


def test_a_long_context_is_cut_with_a_warning(pipe, caplog) -> None:
    """max_context_length cuts the context and says so."""
    cut = pipe(CONTEXT, question="Who?", max_context_length=20, max_new_tokens=4)
    assert "cut from 68 to max_context_length=20" in caplog.text
    assert cut == pipe(CONTEXT[:20], question="Who?", max_new_tokens=4)


def test_wrong_arguments_are_refused(pipe) -> None:
    """Both forms of question, and arguments that do not exist, raise."""
    with pytest.raises(InvalidArgumentError, match="got both"):
        pipe(CONTEXT, question="a", questions=["b"])
    with pytest.raises(InvalidArgumentError, match="answer_prefx"):
        pipe(CONTEXT, question="a", answer_prefx="b")
    with pytest.raises(InvalidArgumentError, match="questions as a list of texts"):
        pipe(CONTEXT, questions="Who?")
    with pytest.raises(InvalidArgumentError, match="max_context_length"):
        pipe(CONTEXT, question="a", max_context_length=-1)


def test_the_name_is_registered() -> None:
    """transformers knows the pipeline by its name."""
    made = pipeline(TASK, model=tiny_model(), tokenizer=ByteTokenizer())
    assert isinstance(made, KVzipPressTextGenerationPipeline)
