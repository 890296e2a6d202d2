"""Any bytes at all are either a grid or refused with an error of ours, in seconds and with bounded memory."""

from __future__ import annotations

import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvzip_press.errors import KVzipPressError
from kvzip_press.leaderboard.running.grid import Grid, load_grid

GRID = """\
description: "Two presses."
model: smollm2
seed: 4
dtype: auto
query_aware: false
batch_size: 2
compression_ratios: &ratios [0.5, 0.9]
tasks:
  - {task: hidden_facts, contexts: 2, tokens: 300, options: {n_keys: 3}}
  - task: niah_single
    name: needle
    contexts: 3
presses:
  - {press: none, label: full cache, compression_ratios: [0.0]}
  - press: kvzip
    options: {chunk_size: 512}
    compression_ratios: *ratios
  - {press: random, options: {allocation: layer, layer_ratios: {0: 0.5, 1: 0.9}}, compression_ratios: [0.0]}
"""
VALUES = (
    "1e999", ".inf", ".nan", "9" * 500, "9" * 30, "0x" + "f" * 300, "1:" * 300 + "1", "2001-01-01", "2001-99-99",
    "!!binary aGk=", "!!int x", "!!bool x", "!!float ''", "!!set {a, b}", "!!python/object/apply:os.getcwd []",
    "!!timestamp x", "*ratios", "&a [*a]", '"\\ud800"', '"\\UFFFFFFFF"', '"\\e[31m\\a"', "<<", "=", "? x", "- - -",
    '"unclosed', "|\n  text", "%YAML", "{1: 2, 1.0: 3}", "{x: 1, x: 2}", "{[a]: 1}", "[[[[[[]]]]]]",
)  # fmt: skip
NAMES = (
    "hidden_facts", "niah_multikey", "kv_retrieval", "ruler", "longbench_trec", "scbench_kv", "random", "kvzip",
    "kvzip_local", "snapkv", "duo_attention", "kvzip_head", "fastkvzip", "none", "n_keys", "source", "preset", "subset",
    "name", "max_new_tokens", "chunk_size", "n_sink", "allocation", "budget", "layer_ratios", "compression_ratio",
    "compression_ratios", "label", "options", "contexts", "tokens", "seed", "decoding", "head",
)  # fmt: skip


def changed_bytes(rng: random.Random) -> bytes:
    data = bytearray(GRID.encode())
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + rng.randint(1, 40)]
            case 2:
                data[at:at] = bytes(rng.choices(b"\x00\x07\x1b\xff\xc3'\"[]{}:,&*!|>%@`-? \n\t#\\", k=rng.randint(1, 5)))
            case _:
                data[at:at] = data[at : at + rng.randint(1, 80)]
    return bytes(data)


def changed_values(rng: random.Random) -> bytes:
    lines = GRID.splitlines()
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(lines))
        before, colon, _ = lines[at].rpartition(":" if rng.random() < 0.5 else ": ")
        value = rng.choice(VALUES)
        lines[at] = f"{before}{colon} {value}" + ("}" if "{" in before and rng.random() < 0.8 else "")
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def drawn(rng: random.Random, depth: int = 0) -> Any:
    """A value of any kind."""
    plain = (
        None, True, False, 0, 1, 2, -1, 300, 2**62, -(2**63), 10**30, 0.0, 0.5, 1.0, 1e300, float("nan"), float("inf"), "",
        "x", "é\u202e\x1b[31m", "[/b]", "a" * 300, "../..", "\0", rng.choice(NAMES), rng.choice(NAMES),
    )  # fmt: skip
    match rng.randrange(8 if depth < 3 else 6):
        case 6:
            return [drawn(rng, depth + 1) for _ in range(rng.randrange(4))]
        case 7:
            keys = (*NAMES, 0, 1, 0.5, None, True)
            return {rng.choice(keys): drawn(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice(plain)


def changed_tree(rng: random.Random) -> bytes:
    """Well-formed YAML in which a value, or a key, is another."""
    tree = yaml.safe_load(GRID)
    for _ in range(rng.choice([1, 1, 2])):
        node: Any = tree
        while True:
            at = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[at], dict | list) or not node[at] or rng.random() < 0.2:
                break
            node = node[at]
        if isinstance(node, dict) and rng.random() < 0.4:
            node[rng.choice(NAMES)] = node.pop(at) if rng.random() < 0.2 else drawn(rng)
        else:
            node[at] = drawn(rng)
    return yaml.safe_dump(tree, sort_keys=False).encode()


def changed_lines(rng: random.Random) -> bytes:
    lines = GRID.splitlines()
    for _ in range(rng.randint(1, 3)):
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        match rng.randrange(4):
            case 0:
                lines.insert(at, lines[other])
            case 1:
                del lines[at]
            case 2:
                lines[at] = " " * rng.randrange(6) + lines[at].lstrip()
            case _:
                lines[at], lines[other] = lines[other], lines[at]
    return "\n".join(lines).encode()


def grown(rng: random.Random) -> bytes:
    n = rng.choice([3, 60, 2000, 30_000])
    piece = rng.choice([
        "x: " + "[" * n, "x: " + "{a: " * n, "x:\n  " + "- " * n, "? " * n, "x: " + "[" * 40 + "]" * 40, "x: '" + "''" * n,
        'x: "' + "a" * n + '"', 'x: "' + " \n" * n + '"', 'x: "' + "\\n" * n + '"', "seed: " + "1" * n, "model: " + "9" * n,
        "seed: 1" + ":1" * n, "seed: 1" + "_1" * n + "x", "x: 1" * 2 + "\n" + "# " * n, "a: " + "&a " * min(n, 50), "%" * n,
        "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(min(n, 40))),
        "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9) if i else '{k: v}'}]}}" for i in range(min(n, 40))),
        "\n".join(f"a{i}: &a{i} [{f'*a{i - 1}' if i else 'x'}]" for i in range(min(n, 2000))),
    ])  # fmt: skip
    return (f"{GRID}{piece}\n" if rng.random() < 0.7 else f"{piece}\n{GRID}").encode()


KINDS = (changed_tree, changed_bytes, changed_tree, changed_values, changed_tree, changed_lines, grown)


def test_a_changed_grid_is_a_grid_or_refused_with_an_error_of_ours(tmp_path: Path) -> None:
    path, outcomes, slowest = tmp_path / "mine.yaml", {"grid": 0, "refused": 0}, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(840):
        rng = random.Random(seed)
        content = KINDS[seed % len(KINDS)](rng)
        path.write_bytes(content)
        begin = time.process_time()
        try:
            assert isinstance(load_grid(str(path)), Grid)
            outcomes["grid"] += 1
        except KVzipPressError as error:
            assert str(error).startswith(f"{path}: "), (seed, error)
            outcomes["refused"] += 1
        except Exception as error:  # which content it was is what matters
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error} from {content[:2000]!r}")
        slowest = max(slowest, time.process_time() - begin)
    assert outcomes["grid"] > 20 and outcomes["refused"] > 500, outcomes
    assert slowest < 30, slowest
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB on Linux
