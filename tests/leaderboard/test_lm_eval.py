"""lm-evaluation-harness on compressed caches: right figures, and none where nothing was evicted."""

import importlib
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvzip_press import KVzipPress, RandomPress, get_press
from kvzip_press.budget.selection import select
from kvzip_press.errors import InvalidArgumentError, MissingDependencyError, NothingEvictedError
from kvzip_press.leaderboard.lm_eval import PressLM
from kvzip_press.leaderboard.lm_eval_prompts import SPLITS, Generation
from kvzip_press.prefilling.whole import run_prefill
from kvzip_press.press import Press
from kvzip_press.testing import evicted_keys_masked, tiny_model

CONTEXT = " ".join(f"Box {number} holds {number * 7 % 13} stones." for number in range(12)) + "\n\n"
QUESTIONS = ("How many stones are in box 3?", "And in box 7, which is the blue one?")
CHOICES = (" 8", " 1 or 2", " none at all")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes, an end of text, and no file."""
    alphabet = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(vocab_size=258, bos_token_id=None, eos_token_id=256, pad_token_id=257)


@pytest.fixture
def make(model: Any, tokenizer: Any) -> Callable[..., PressLM]:
    usual = RandomPress(0.5, seed=3)
    return lambda press=usual, **options: PressLM(model, press, tokenizer=tokenizer, **options)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]


def scores(found: list[tuple[float, bool]]) -> torch.Tensor:
    return torch.tensor([score for score, _ in found])


class Masked:
    """The same model with a dense cache, from which a mask hides what the press evicts: what must come out."""

    def __init__(self, model: Any, tokenizer: Any, press: Press) -> None:
        self.model, self.tokenizer, self.press = model, tokenizer, press

    @torch.no_grad()
    def read(self, context: str) -> tuple[Any, dict[int, torch.Tensor]]:
        """The dense cache of a context, and which pairs of it may be seen."""
        ids = torch.tensor([self.tokenizer.encode(context)])
        done = run_prefill(self.model, ids, torch.ones_like(ids, dtype=torch.bool), observers=[self.press])
        return done.cache, select(self.press.score(done), done.valid)

    @torch.no_grad()
    def loglikelihood(self, context: str, question: str, continuation: str) -> tuple[float, bool]:
        before, ids = self.tokenizer.encode(question), self.tokenizer.encode(continuation)
        cache, keep = self.read(context)
        with evicted_keys_masked(self.model, keep):
            output = self.model(input_ids=torch.tensor([[*before, *ids][:-1]]), past_key_values=cache, use_cache=True)
        logits = output.logits[0, -len(ids) :]
        picked = logits.log_softmax(dim=-1)[torch.arange(len(ids)), torch.tensor(ids)]
        return float(picked.sum()), logits.argmax(dim=-1).tolist() == ids

    @torch.no_grad()
    def greedy(self, context: str, question: str, n: int) -> str:
        cache, keep = self.read(context)
        unread, written = self.tokenizer.encode(question), list[int]()
        with evicted_keys_masked(self.model, keep):
            while len(written) < n:
                output = self.model(input_ids=torch.tensor([unread]), past_key_values=cache, use_cache=True)
                unread = [int(output.logits[0, -1].argmax())]
                written += unread
        return self.tokenizer.decode(written, skip_special_tokens=True)


@pytest.fixture
def masked(model: Any, tokenizer: Any) -> Masked:
    return Masked(model, tokenizer, RandomPress(0.5, seed=3))


def test_continuations_are_scored_behind_the_compressed_context(make: Callable[..., PressLM], masked: Masked) -> None:
    pairs = [(CONTEXT + question, choice) for choice in CHOICES for question in QUESTIONS]
    lm = make()
    found = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    expected = [masked.loglikelihood(CONTEXT, question, choice) for choice in CHOICES for question in QUESTIONS]
    torch.testing.assert_close(scores(found), scores(expected))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len(lm.measured) == 1  # six requests, one context, compressed once


def test_a_continuation_that_the_model_would_write_is_greedy(make: Callable[..., PressLM], masked: Masked) -> None:
    likely = masked.greedy(CONTEXT, QUESTIONS[0], 2)
    found = make().loglikelihood(requests("loglikelihood", [(CONTEXT + QUESTIONS[0], likely)]), disable_tqdm=True)
    assert found[0][1]


def test_pairs_that_are_evicted_move_the_figures(model: Any, tokenizer: Any, make: Callable[..., PressLM]) -> None:
    asked = requests("loglikelihood", [(CONTEXT + QUESTIONS[0], choice) for choice in CHOICES])
    dense = HFLM(model, tokenizer=tokenizer).loglikelihood(asked, disable_tqdm=True)
    found = make(RandomPress(0.9)).loglikelihood(asked, disable_tqdm=True)
    assert all(abs(one - other) > 1e-3 for (one, _), (other, _) in zip(found, dense, strict=True))


def test_with_a_pair_evicted_figures_are_nearly_those_of_the_full_cache(
    model: Any, tokenizer: Any, make: Callable[..., PressLM]
) -> None:
    asked = requests("loglikelihood", [(CONTEXT + question, " 8") for question in QUESTIONS])
    dense = HFLM(model, tokenizer=tokenizer).loglikelihood(asked, disable_tqdm=True)
    lm = make(KVzipPress(0.001))
    found = lm.loglikelihood(asked, disable_tqdm=True)
    assert 0 < lm.measured[0].n_pairs - lm.measured[0].n_kept < 5
    torch.testing.assert_close(scores(found), scores(dense), rtol=0.01, atol=0.05)


def test_answers_are_written_from_the_compressed_context(make: Callable[..., PressLM], masked: Masked) -> None:
    options = {"until": [], "max_gen_toks": 40, "do_sample": False}  # over two looks for a stop sequence
    asked = requests("generate_until", [(CONTEXT + question, options) for question in QUESTIONS])
    expected = [masked.greedy(CONTEXT, question, 40) for question in QUESTIONS]
    assert make().generate_until(asked, disable_tqdm=True) == expected
    assert len(set(expected)) == 2


def test_an_answer_ends_before_its_stop_sequence(make: Callable[..., PressLM], masked: Masked) -> None:
    whole = masked.greedy(CONTEXT, QUESTIONS[0], 40)
    options = {"until": [whole[20:23], whole[10:12]], "max_gen_toks": 40}
    (found,) = make().generate_until(requests("generate_until", [(CONTEXT + QUESTIONS[0], options)]), disable_tqdm=True)
    assert found == whole[: min(whole.find(stop) for stop in options["until"])]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"do_sample": True, "temperature": 0.7}, "0.7"), ({"temperature": 0.7}, "0.7"), ({"num_beams": 4}, "num_beams")],
)
def test_generation_that_is_not_greedy_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        Generation.of({"until": ["\n"], **options})


def test_options_of_a_request_have_defaults() -> None:
    assert Generation.of({"until": "\n", "do_sample": False, "temperature": 0.0}) == Generation(("\n",), 256)
    assert Generation.of({"max_new_tokens": 5, "until": ["", "a"]}) == Generation(("a",), 5)


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("Q: 1?\nA: 2\n\nQ: 2?\nA:", "Q: 2?\nA:"),
        ("passage\n\nquestion\n\n", "question\n\n"),
        ("no paragraphs", "no paragraphs"),
        ("", ""),
    ],
)
def test_the_question_is_the_last_paragraph(prompt: str, question: str) -> None:
    assert prompt[SPLITS["last_paragraph"](prompt) :] == question


def test_a_whole_prompt_leaves_its_last_token_to_the_question(make: Callable[..., PressLM], masked: Masked) -> None:
    prompt = (CONTEXT + QUESTIONS[0]).strip()
    found = make(split="whole_prompt").loglikelihood(requests("loglikelihood", [(prompt, " 8")]), disable_tqdm=True)
    assert found[0][0] == pytest.approx(masked.loglikelihood(prompt[:-1], prompt[-1], " 8")[0], rel=1e-4)


@pytest.mark.parametrize("press", [get_press("none"), KVzipPress(0.0), KVzipPress(budget=10_000)])
def test_a_press_that_evicts_nothing_is_refused(make: Callable[..., PressLM], press: Press) -> None:
    with pytest.raises(NothingEvictedError, match="kept"):
        make(press).loglikelihood(requests("loglikelihood", [(CONTEXT + QUESTIONS[0], " 8")]), disable_tqdm=True)


@pytest.mark.parametrize("prompt", ["A long question without a paragraph before it. " * 20, "Hi.\n\nWho?", ""])
def test_a_prompt_without_a_context_of_its_own_is_refused(make: Callable[..., PressLM], prompt: str) -> None:
    with pytest.raises(NothingEvictedError, match="at least 64 tokens"):
        make().loglikelihood(requests("loglikelihood", [(prompt, " yes")]), disable_tqdm=True)
    with pytest.raises(NothingEvictedError, match="at least 64 tokens"):
        make().generate_until(requests("generate_until", [(prompt, {"until": ["\n"]})]), disable_tqdm=True)


def test_perplexity_of_whole_texts_is_refused(make: Callable[..., PressLM]) -> None:
    with pytest.raises(NothingEvictedError, match="loglikelihood_rolling"):
        make().loglikelihood_rolling(requests("loglikelihood_rolling", [("text",)]))


def test_prompts_beyond_the_models_positions_are_refused_and_not_cut(tokenizer: Any) -> None:
    short = tiny_model(vocab_size=258, bos_token_id=None, eos_token_id=256, max_position_embeddings=330)
    lm = PressLM(short, RandomPress(0.5), tokenizer=tokenizer)
    with pytest.raises(InvalidArgumentError, match="330"):
        lm.loglikelihood(requests("loglikelihood", [(CONTEXT + QUESTIONS[0], " 8" * 40)]), disable_tqdm=True)
    with pytest.raises(InvalidArgumentError, match="330"):
        lm.generate_until(requests("generate_until", [(CONTEXT + QUESTIONS[0], {})]), disable_tqdm=True)


def test_a_press_can_be_named_as_on_the_command_line(model: Any, tokenizer: Any) -> None:
    given = {"pretrained": model, "tokenizer": tokenizer, "press": "random", "compression_ratio": 0.5}
    assert lm_eval.api.registry.get_model("kvzip-press").create_from_arg_obj(given).press == RandomPress(0.5)
    with pytest.raises(InvalidArgumentError, match=r"0\.5"):
        PressLM(model, RandomPress(0.3), compression_ratio=0.5, tokenizer=tokenizer)
    with pytest.raises(InvalidArgumentError, match="last_paragraph"):
        PressLM(model, "random", split="paragraph", tokenizer=tokenizer)


@pytest.fixture
def facts(tmp_path: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """Makes a task of lm-evaluation-harness over a local file: which stone lies in which box."""
    colours = ["red", "green", "blue", "white", "black", "brown"]
    rng = random.Random(0)
    lines = []
    for _ in range(2):
        held = rng.sample(colours, k=6)
        rows = " ".join(f"The {colour} stone lies in box number {box}." for box, colour in enumerate(held, start=1))
        lines += [
            {"passage": f"{rows} " * 3, "box": box, "choices": colours, "gold": colours.index(held[box - 1])}
            for box in (1, 5)
        ]
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    def task(**settings: Any) -> dict[str, Any]:
        return {
            "task": f"facts_{settings['output_type']}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")},
            "test_split": "test",
            "doc_to_text": "{{passage}}\n\nWhich stone lies in box number {{box}}? The",
            **settings,
        }

    return task


def test_tasks_run_through_lm_evaluation_harness(
    make: Callable[..., PressLM], masked: Masked, facts: Callable[..., dict[str, Any]]
) -> None:
    choice = facts(output_type="multiple_choice", doc_to_choice="{{choices}}", doc_to_target="gold")
    write = facts(
        output_type="generate_until",
        doc_to_target="{{choices[gold]}}",
        generation_kwargs={"until": ["."], "max_gen_toks": 8},
        metric_list=[{"metric": "exact_match"}],
    )
    lm = make()
    results = lm_eval.simple_evaluate(lm, tasks=[choice, write], bootstrap_iters=0)
    assert results["config"]["press"] == repr(RandomPress(0.5, seed=3))
    assert results["config"]["kept_fraction"] == pytest.approx(0.5, abs=0.01)
    assert len(lm.measured) == 4  # two passages, each for two tasks
    assert results["n-samples"]["facts_multiple_choice"]["effective"] == 4
    sample = results["samples"]["facts_multiple_choice"][0]
    context, _, question = sample["arguments"][0][0].rpartition("\n\n")
    expected = [masked.loglikelihood(context + "\n\n", question, f" {one}") for one in sample["doc"]["choices"]]
    torch.testing.assert_close(torch.tensor([float(resp[0][0]) for resp in sample["resps"]]), scores(expected))


@pytest.mark.slow
def test_the_command_is_lm_evals_own_with_one_more_model(
    model: Any, tokenizer: Any, facts: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    task = facts(output_type="multiple_choice", doc_to_choice="{{choices}}", doc_to_target="gold")
    (tmp_path / "facts.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    command = [
        *(sys.executable, "-m", "kvzip_press.leaderboard.lm_eval", "--model", "kvzip-press", "--device", "cpu"),
        *("--model_args", f"pretrained={tmp_path / 'model'},press=random,compression_ratio=0.5"),
        *("--include_path", str(tmp_path), "--tasks", task["task"], "--output_path", str(tmp_path / "out")),
    ]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["config"]["press"].startswith("RandomPress(compression_ratio=0.5")
    assert results["config"]["kept_fraction"] == pytest.approx(0.5, abs=0.01)
    assert results["results"][task["task"]]["acc,none"] in {0.0, 0.25, 0.5, 0.75, 1.0}


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "kvzip_press.leaderboard.lm_eval")
    with pytest.raises(MissingDependencyError, match=r"kvzip-press\[lm-eval\]"):
        importlib.import_module("kvzip_press.leaderboard.lm_eval")
