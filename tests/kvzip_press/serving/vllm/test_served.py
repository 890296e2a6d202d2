"""`kvzip-press serve` as users start it: many requests at once, clients that go, files that come, are torn or change.

``--soak 6000`` asks as many more, of this server and of vLLM alone, and compares by how much their processes grow.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from growth import N_STRETCHES, growth

from kvzip_press import RaggedCache, RandomPress, compress
from kvzip_press.decoding.answering import answer_ids, question_ids
from kvzip_press.testing import tiny_model

pytestmark = pytest.mark.vllm
TEXTS = {
    "lighthouse": "The lighthouse stands on a cliff of grey stone. " * 4,
    "archive": "Room four holds the maps. " * 3,
}
QUESTIONS = ["Who?", "Where does it stand, and since when?", "What is in room four?"]
N_TOKENS = 12
N_WARM, MAX_GROWTH = 2000, 200  # requests before a soak; bytes a request
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
    "PYTHONSAFEPATH": "1",  # vLLM runs modules of its own with -m, where the folder they run in comes first
}
# room for one context at a time, and pages for fewer than eight requests: contexts are dropped, requests preempted
OPTIONS = [
    *("--pool-gb", "0.00011", "--max-model-len", "128", "--max-num-seqs", "8", "--block-size", "32"),
    *("--num-gpu-blocks-override", "11", "--enforce-eager", "--api-key", "secret"),
]
HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer secret"}


def tokenizer_of_characters() -> Any:
    """A tokenizer with files, as a server needs it: an id for each printable character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "\n": 3, **{chr(code): code - 28 for code in range(32, 127)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@dataclass
class Served:
    """A running server, and what answers should be."""

    port: int
    folder: Path
    process: subprocess.Popen[bytes]
    model: Any
    tokenizer: Any
    caches: dict[str, RaggedCache]
    expected: dict[tuple[str, str], list[int]]

    def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            data = body if isinstance(body, bytes) else None if body is None else json.dumps(body)
            connection.request(method, path, data, HEADERS if headers is None else headers)
            response = connection.getresponse()
            text = response.read()
            return response.status, json.loads(text) if text.startswith(b"{") else text.decode()
        finally:
            connection.close()

    def body(self, name: str | None, question: str, n_tokens: int = N_TOKENS, **options: Any) -> dict[str, Any]:
        asked = {} if name is None else {"kv_transfer_params": {"context": name}}
        prompt = list(question_ids(self.tokenizer, question))
        fixed = {"model": "tiny", "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return {**fixed, "prompt": prompt, "max_tokens": n_tokens, **asked, **options}

    def ids(self, name: str | None, question: str, **options: Any) -> list[int]:
        status, answer = self.send("POST", "/v1/completions", self.body(name, question, **options))
        assert status == 200, answer
        found: list[int] = answer["choices"][0]["token_ids"]
        return found

    def assert_answers(self, name: str, question: str, as_name: str | None = None) -> None:
        own = self.expected[name, question]
        assert self.ids(as_name or name, question)[: len(own)] == own

    def preemptions(self) -> float:
        _, metrics = self.send("GET", "/metrics")
        lines = [line for line in metrics.splitlines() if line.startswith("vllm:num_preemptions_total")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def memory(self) -> int:
        """Bytes that are the processes' alone: pages of files come and go with the machine's memory."""
        import psutil

        root = psutil.Process(self.process.pid)
        return sum(one.memory_full_info().uss for one in (root, *root.children(recursive=True)))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("served")
    model, tokenizer = (
        tiny_model("llama", num_layers=2, head_dim=32, tie_word_embeddings=False),
        tokenizer_of_characters(),
    )
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    (place / "contexts").mkdir()
    caches = {name: compress(model, tokenizer, text, RandomPress(0.5)) for name, text in TEXTS.items()}
    for name, cache in caches.items():
        cache.save(place / "contexts" / f"{name}.safetensors")
    expected = {
        (name, question): answer_ids(model, tokenizer, cache, question, max_new_tokens=N_TOKENS)[0]
        for name, cache in caches.items()
        for question in QUESTIONS
    }
    command = [str(Path(sys.executable).with_name("kvzip-press")), "serve", "--model", str(place / "model")]
    command += ["--contexts", str(place / "contexts"), *OPTIONS]
    with running(command, place / "log") as (port, process):
        yield Served(port, place / "contexts", process, model, tokenizer, caches, expected)


@contextmanager
def running(command: list[str], log: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A server of vLLM, from when it answers, with its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, **ENVIRONMENT}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--served-model-name", "tiny"],
            env=environment, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    try:
        _wait(port, process, log)
        yield port, process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with suppress(OSError), closing(connection):
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(1)
    raise AssertionError(log.read_text(errors="replace")[-3000:])


def test_questions_in_chat_are_framed_as_answer_frames_them(served: Served) -> None:
    message = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "max_tokens": N_TOKENS, "temperature": 0}
    body = {**message, "model": "tiny", "kv_transfer_params": {"context": "archive"}, "ignore_eos": True}
    status, answer = served.send("POST", "/v1/chat/completions", {**body, "return_token_ids": True})
    own = served.expected["archive", QUESTIONS[0]]
    assert status == 200, answer
    assert answer["choices"][0]["token_ids"][: len(own)] == own


def test_what_cannot_be_answered_is_refused_and_the_server_lives(served: Served) -> None:
    whole = (served.folder / "archive.safetensors").read_bytes()
    (served.folder / "torn.safetensors").write_bytes(whole[:-30])
    for params in ({"context": "unknown"}, {"context": "../archive"}, {"context": "torn"}, {"context": 5}):
        status, answer = served.send("POST", "/v1/completions", served.body(None, "Who?", kv_transfer_params=params))
        assert status == 400, answer
        assert answer["error"]["message"].startswith("expected") and str(served.folder) not in json.dumps(answer)
    message = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}]}
    unknown = {"kv_transfer_params": {"context": "unknown"}}
    sampling = {"max_tokens": 1, "extra_args": unknown}
    for path, body in (
        ("/v1/chat/completions", {**message, **unknown, "stream": True}),
        ("/v1/chat/completions/batch", {**message, "messages": [message["messages"]], **unknown}),
        ("/v1/messages", {**message, "max_tokens": 1, **unknown}),
        ("/v1/responses", {"model": "tiny", "input": "Who?", **unknown}),
        ("/v1/completions", {"model": "tiny", "prompt": "Who?", "vllm_xargs": {"kv_transfer_params": "archive"}}),
        ("/inference/v1/generate", {"token_ids": [40], "sampling_params": sampling}),
        ("/v1/completions", served.body("archive", "Who?", use_beam_search=True)),
    ):
        status, answer = served.send("POST", path, body)
        assert status == 400 and answer["error"]["message"].startswith("expected"), (path, answer)
    served.assert_answers("archive", "Who?")


def test_a_stranger_does_not_learn_which_contexts_there_are(served: Served) -> None:
    strangers = {"Content-Type": "application/json"}, {"Content-Type": "application/json", "Authorization": "Bearer x"}
    answers = [
        served.send("POST", "/v1/completions", served.body(name, "Who?"), headers)
        for headers in strangers
        for name in ("archive", "unknown", None)
    ]
    assert answers[0][0] == 401 and all(one == answers[0] for one in answers)


def test_a_context_is_added_while_serving(served: Served) -> None:
    whole = (served.folder / "archive.safetensors").read_bytes()
    (served.folder / "dropped.safetensors").write_bytes(whole)
    served.assert_answers("archive", QUESTIONS[1], as_name="dropped")
    status, described = served.send("POST", "/v1/contexts?name=added", whole)
    assert (status, described["id"]) == (201, "added")
    served.assert_answers("archive", QUESTIONS[1], as_name="added")
    for method in ("GET", "POST"):
        assert served.send(method, "/v1/contexts?name=added", headers={})[0] == 401, "behind the server's key"
    for path, data in (
        ("/v1/contexts?name=../added", whole),
        ("/v1/contexts?name=torn2", whole[:-9]),
        ("/v1/contexts", whole),
    ):
        assert served.send("POST", path, data)[0] == 400
    status, listed = served.send("GET", "/v1/contexts")
    assert status == 200 and {"added", "dropped", "archive", "lighthouse"} <= {one["id"] for one in listed["data"]}
    assert "torn2" not in listed["refused"]


def test_two_hundred_requests_arrive_at_random_and_some_clients_go(served: Served) -> None:
    """Contexts are dropped and read again all the while, requests preempted; every answer is that of `answer`."""
    drawn = random.Random(0)
    before, contexts = served.preemptions(), [*TEXTS, None]
    plain = {question: served.ids(None, question) for question in QUESTIONS}
    requests = [
        (drawn.expovariate(40), drawn.choice(contexts), drawn.choice(QUESTIONS), drawn.random() < 0.15)
        for _ in range(200)
    ]

    def ask(request: tuple[float, str | None, str, bool]) -> bool:
        _, name, question, goes = request
        if goes:
            return _leave(served, served.body(name, question, 60, stream=True))
        if name is None:
            return served.ids(None, question) == plain[question]
        own = served.expected[name, question]
        return served.ids(name, question)[: len(own)] == own

    with ThreadPoolExecutor(max_workers=24) as pool:
        answers = []
        for request in requests:
            time.sleep(request[0])
            answers.append(pool.submit(ask, request))
        right = [answer.result() for answer in answers]
    assert all(right), f"{right.count(False)} of 200 differ"
    with ThreadPoolExecutor(
        max_workers=8
    ) as pool:  # eight long answers at once need three times the pages that there are
        long = list(pool.map(lambda _: tuple(served.ids(None, QUESTIONS[1], n_tokens=80)), range(8)))
    assert served.preemptions() > before, "pages were scarce"
    assert len(set(long)) == 1
    for name in TEXTS:
        served.assert_answers(name, QUESTIONS[2])


def _leave(served: Served, body: dict[str, Any]) -> bool:
    """Reads the beginning of a streamed answer, and closes the connection."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=300)
    connection.request("POST", "/v1/completions", json.dumps(body), HEADERS)
    response = connection.getresponse()
    read = response.read(20)
    connection.close()
    return response.status == 200 and read.startswith(b"data")


def test_a_killed_client_takes_nothing_along(served: Served) -> None:
    script = (
        "import http.client, json, sys\n"
        "c = http.client.HTTPConnection('127.0.0.1', int(sys.argv[1]))\n"
        "c.request('POST', '/v1/completions', sys.argv[2], json.loads(sys.argv[3]))\n"
        "r = c.getresponse(); print(r.read(10), flush=True)\n"
        "import time; time.sleep(600)\n"
    )
    body = json.dumps(served.body("lighthouse", QUESTIONS[0], 60, stream=True))
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(served.port), body, json.dumps(HEADERS)], stdout=subprocess.PIPE
        )
        for _ in range(6)
    ]
    for client in clients:
        assert client.stdout is not None and client.stdout.readline()
        client.send_signal(signal.SIGKILL)
        client.wait()
    for _ in range(2):  # the other context needs the room that theirs had
        for name in TEXTS:
            served.assert_answers(name, QUESTIONS[0])


def test_the_example_asks_without_a_server(served: Served, repo_root: Path) -> None:
    """Its engine runs beside the server's, over the same folder."""
    example, model = repo_root / "docs" / "examples" / "vllm_offline.py", served.folder.parent / "model"
    environment = {**os.environ, **ENVIRONMENT}
    finished = subprocess.run(
        [sys.executable, str(example), str(model), str(served.folder)],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    for name, cache in served.caches.items():
        [ids] = answer_ids(served.model, served.tokenizer, cache, "What is this about?", max_new_tokens=32)
        expected = served.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert f"{name}: {expected}" in finished.stdout
    assert "no context: " in finished.stdout


def test_nothing_grows(served: Served, request: pytest.FixtureRequest) -> None:
    """Beside vLLM alone, asked in turn: what requests about contexts leave behind is nothing, as far as it shows."""
    n_requests: int = request.config.getoption("--soak")
    if not n_requests:
        pytest.skip("asks for --soak 6000")
    place = served.folder.parent
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(place / "model")]
    command += ["--dtype", "float32", "--no-enable-prefix-caching", *OPTIONS[2:]]
    with running(command, place / "control") as (port, process):
        control = replace(served, port=port, process=process)
        own, alone = _noted(((served, ("archive", "lighthouse", None)), (control, (None,))), n_requests)
    more = growth([one - other for one, other in zip(own, alone, strict=True)], n_requests)
    seen = f"{n_requests} requests: {growth(own, n_requests)}, vLLM alone {growth(alone, n_requests)}, more {more}"
    print(f"\n{seen}")
    assert more.high < MAX_GROWTH, seen


def _noted(sides: Sequence[tuple[Served, tuple[str | None, ...]]], n_requests: int) -> list[list[int]]:
    """Bytes of each server before and after stretches of requests, which the servers get in turn.

    Before the first, all is asked for that is kept once: pages that are written for the first time, and the 2 MB that
    vLLM's worker takes for each number of tokens that a step has; there are as many as eight questions have tokens.
    """
    asks = [_asker(server, contexts) for server, contexts in sides]
    for server, _ in sides:
        for n_tokens in range(1, 8 * len(question_ids(server.tokenizer, QUESTIONS[0])) + 1):
            server.ids(None, QUESTIONS[0], n_tokens=3, prompt=[40] * n_tokens)
    noted: list[list[int]] = [[] for _ in sides]
    with ThreadPoolExecutor(max_workers=16) as pool:
        for n in (N_WARM, *[n_requests // N_STRETCHES] * N_STRETCHES):
            for (server, _), ask, bytes_ in zip(sides, asks, noted, strict=True):
                list(pool.map(ask, range(n)))
                bytes_.append(server.memory())
    return noted


def _asker(server: Served, contexts: tuple[str | None, ...]) -> Callable[[int], None]:
    def ask(number: int) -> None:
        name, question = contexts[number % len(contexts)], QUESTIONS[0]
        if number % 50 == 0:
            body = server.body(None, question, n_tokens=-1) if contexts == (None,) else server.body("unknown", question)
            assert server.send("POST", "/v1/completions", body)[0] == 400
        elif name is None:
            server.ids(None, question, n_tokens=3)
        else:
            own = server.expected[name, question][:3]
            assert server.ids(name, question, n_tokens=3)[: len(own)] == own

    return ask
