"""vLLM itself, on a CPU, in processes of its own: answers are those of `answer`; what it cannot answer it refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvzip_press import RandomPress, compress
from kvzip_press.decoding.answering import answer_ids, question_ids
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.serving.vllm.facts import ServedModel
from kvzip_press.serving.vllm.plugin import engine_options
from kvzip_press.serving.vllm.requests import context_params
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.vllm
TEXTS = {
    "lighthouse": "The lighthouse stands on a cliff of grey stone. " * 4,
    "archive": "Room four holds the maps. " * 3,
}
QUESTIONS = ["Who?", "Where does it stand, and since when?", "What is in room four?"]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
    "PYTHONSAFEPATH": "1",  # vLLM runs modules of its own with -m, where the folder they run in comes first
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", num_layers=2, head_dim=32, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model: Any, tokenizer: ByteTokenizer) -> Path:
    place = tmp_path_factory.mktemp("engine")
    model.save_pretrained(place / "model")
    (place / "contexts").mkdir()
    for name, text in TEXTS.items():
        cache = compress(model, tokenizer, text, RandomPress(0.5))
        cache.save(place / "contexts" / f"{name}.safetensors")
    return place


@pytest.fixture(scope="module")
def engine(place: Path, model: Any) -> Iterator[Any]:
    """An engine with few blocks, so that requests are preempted, and a pool with room for one context at a time."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    served = ServedModel.of(model, place / "contexts", pool_bytes=110_000)
    served.write(place / "served.json")
    options = engine_options(str(place / "served.json"))
    from vllm import LLM

    made = LLM(
        str(place / "model"),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=8,
        block_size=32,
        num_gpu_blocks_override=12,
        enforce_eager=True,
        disable_log_stats=True,
        **options,
    )
    # Unless it is told, vLLM takes the older runner where it has no Triton, as here; test_newer_runner.py tells it.
    newer = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
    assert made.llm_engine.vllm_config.use_v2_model_runner is newer
    yield made
    os.environ.clear()
    os.environ.update(before)


SAMPLING = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "detokenize": False}


def ask(engine: Any, tokenizer: ByteTokenizer, asked: list[tuple[str | None, str]], **options: Any) -> list[list[int]]:
    prompts = [{"prompt_token_ids": question_ids(tokenizer, question)} for _, question in asked]
    params = [context_params(name, **SAMPLING, **options) for name, _ in asked]
    return [list(one.outputs[0].token_ids) for one in engine.generate(prompts, params, use_tqdm=False)]


def expected(model: Any, tokenizer: ByteTokenizer, name: str, question: str) -> list[int]:
    cache = compress(model, tokenizer, TEXTS[name], RandomPress(0.5))
    return answer_ids(model, tokenizer, cache, question, max_new_tokens=24)[0]


def test_answers_of_the_engine_are_those_of_answer(engine: Any, model: Any, tokenizer: ByteTokenizer) -> None:
    """Eighteen requests at once, two contexts and none, preempted where pages run out."""
    asked = [(name, question) for name in (*TEXTS, None) for question in QUESTIONS] * 2
    got = ask(engine, tokenizer, asked)
    for (name, question), ids in zip(asked, got, strict=True):
        if name is not None:
            own = expected(model, tokenizer, name, question)
            assert ids[: len(own)] == own
        else:
            read = torch.tensor([question_ids(tokenizer, question)])
            for _ in range(24):
                read = torch.cat([read, model(read).logits[:, -1:].argmax(-1)], 1)
            assert ids == read[0, -24:].tolist()


def test_what_cannot_be_answered_is_refused_and_the_engine_lives(
    engine: Any, place: Path, tokenizer: ByteTokenizer, model: Any
) -> None:
    whole = (place / "contexts" / "archive.safetensors").read_bytes()
    (place / "contexts" / "torn.safetensors").write_bytes(whole[:-30])
    for name in ("unknown", "../contexts/archive", "torn"):
        with pytest.raises(InvalidArgumentError, match="expected"):
            ask(engine, tokenizer, [(name, "Who?")])
    (place / "contexts" / "late.safetensors").write_bytes(whole)
    [ids] = ask(engine, tokenizer, [("late", "Who?")])
    own = expected(model, tokenizer, "archive", "Who?")
    assert ids[: len(own)] == own


def test_what_comes_past_the_check_ends_with_an_error_and_the_others_are_answered(
    engine: Any, place: Path, tokenizer: ByteTokenizer, model: Any
) -> None:
    """Parameters of one's own, and a context that goes before its turn; one of them as short as a question can be."""
    from vllm import SamplingParams

    path = place / "contexts" / "gone.safetensors"
    path.write_bytes((place / "contexts" / "archive.safetensors").read_bytes())
    params = [context_params(name, **SAMPLING) for name in ("lighthouse", "gone", "archive", None)]
    path.unlink()
    own = SamplingParams(**SAMPLING, extra_args={"kv_transfer_params": {"context": "unknown"}})
    ids = question_ids(tokenizer, "Who?")
    prompts = [{"prompt_token_ids": one} for one in (ids, ids, ids, ids, ids[:1])]
    for _ in range(2):
        answers = engine.generate(prompts, [*params, own], use_tqdm=False)
        assert [one.outputs[0].finish_reason for one in answers] == ["length", "error", "length", "length", "error"]
        assert [len(one.outputs[0].token_ids) for one in answers] == [24, 0, 24, 24, 0]
        for name, answer in zip(("lighthouse", "archive"), (answers[0], answers[2]), strict=True):
            own_ids = expected(model, tokenizer, name, "Who?")
            assert list(answer.outputs[0].token_ids)[: len(own_ids)] == own_ids


def test_probabilities_of_a_question_are_those_behind_its_context(
    engine: Any, model: Any, tokenizer: ByteTokenizer
) -> None:
    """Such requests must not read cached pages; two contexts, of which one waits for the other's room."""
    asked = [(name, QUESTIONS[0]) for name in TEXTS] * 3
    for (name, question), ids in zip(asked, ask(engine, tokenizer, asked, prompt_logprobs=1), strict=True):
        own = expected(model, tokenizer, name, question)
        assert ids[: len(own)] == own
