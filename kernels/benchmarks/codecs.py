"""Times ragged attention to codes in a decode step, beside the same pairs in bf16 and beside the time of their bytes.

``python -m kvzip_press.kernels.benchmarks.codecs --output codecs.csv [--cases n4096] [--quick]``

Every result is compared with attention to the decoded rows in fp64 before it is timed. The kernel's own choice of block
sizes comes first, for all cases; other ones follow while there is time (:data:`SECONDS`). A failure is printed, and the
next measurement is made.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kvzip_press.kernels.benchmarks.cases import TAIL, DecodeCase, DecodeInputs
from kvzip_press.kernels.benchmarks.harness import Bench, WrongResultError, start
from kvzip_press.kernels.benchmarks.timing import Call, copies_for
from kvzip_press.kernels.ragged_attention import Part, parted_attention, ragged_attention
from kvzip_press.kernels.ragged_attention.inputs import RaggedInputs
from kvzip_press.kernels.ragged_attention.tuning import Config
from kvzip_press.kernels.row_codec import Codes, encode_rows

ERROR_LIMIT = 1e-2  # of bf16 results; the codes' own error is not in it
IMPL: str | None = "triton"
SECONDS = 150.0  # no measurement begins later than this
CODECS = {"int8": ("int8", "int8"), "k8v4": ("int8", "int4"), "int4": ("int4", "int4"), "fp8": ("fp8", "fp8")}
PARTED = {"k8v4": ["k8v4"], "int4": ["int4"], "tiers": ["k8v4", "k4v2"]}
"""Codecs of the parts that follow a head's first tokens, which are exact."""
FIRST = 4  # of these tokens

ASKED_FOR = ["int8", "k8v4", "int4"]
"""Codecs that are measured first, and with other block sizes too."""

CASES = [
    DecodeCase(32, 8, 128, 131072),
    DecodeCase(32, 8, 128, 16384, batch=8),
    DecodeCase(32, 8, 128, 65536),
    DecodeCase(32, 8, 128, 4096),
    DecodeCase(32, 8, 128, 32768, exactly=(32768, *[1024] * 7)),
    DecodeCase(4, 1, 256, 131072),
]

CONFIGS = [
    Config(16, 128, 4, 3, 2),
    Config(16, 64, 4, 3, 3),
    Config(16, 64, 4, 4, 2),
    Config(16, 128, 4, 3, 3),
]
"""Block sizes beside the kernel's own choice."""


@dataclass(frozen=True)
class Coded:
    """One copy of a case's inputs, its packed pairs as codes."""

    inputs: DecodeInputs
    keys: Codes
    values: Codes

    @classmethod
    def of(cls, inputs: DecodeInputs, codec: str) -> "Coded":
        """Encodes the packed pairs of ``inputs``, and lets go of them."""
        key_codec, value_codec = CODECS[codec]
        nothing = inputs.keys.new_empty(0)
        rest = replace(inputs, keys=nothing, values=nothing)
        return cls(rest, encode_rows(inputs.keys, key_codec), encode_rows(inputs.values, value_codec))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.keys.nbytes + self.values.nbytes

    def attend(self, tail: int, config: Config | None, impl: str | None) -> Tensor:
        """Runs the op, or the kernel with block sizes of its own."""
        own = self.inputs
        tails = (own.tail_keys, own.tail_values) if tail else (None, None)
        if config is None:
            out = ragged_attention(own.query, self.keys, self.values, own.cu_seqlens, *tails, impl=impl)
            assert isinstance(out, Tensor)
            return out
        from kvzip_press.kernels.ragged_attention.codes.triton import ragged_attention as kernel  # needs triton

        ragged = RaggedInputs(own.query, self.keys, self.values, own.cu_seqlens, *tails)
        return kernel(ragged, scaling=own.query.shape[-1] ** -0.5, softcap=None, config=config)[0]

    def exact(self, tail: int) -> Tensor:
        """Attention to the decoded rows in fp64."""
        names = ("query", "tail_keys", "tail_values")
        exact = replace(self.inputs, **{name: getattr(self.inputs, name).double() for name in names})
        return replace(self, inputs=exact).attend(tail, None, "reference")


@dataclass(frozen=True)
class InParts:
    """One copy of a case's inputs, each head's first tokens exact, the others as codes, those of tiers in two parts."""

    inputs: DecodeInputs
    parts: list[Part]

    @classmethod
    def of(cls, inputs: DecodeInputs, codecs: Sequence[str]) -> "InParts":
        """Encodes the packed pairs of ``inputs``, a third of each head's as the first codec if there are two."""
        lengths, device = inputs.cu_seqlens.diff(), inputs.keys.device
        n_first = lengths.clamp(max=FIRST)
        n_high = (lengths - n_first) // 3 if len(codecs) > 1 else lengths - n_first
        places = torch.arange(len(inputs.keys), device=device) - inputs.cu_seqlens[:-1].repeat_interleave(lengths)
        ends = [n.repeat_interleave(lengths) for n in (n_first, n_first + n_high, lengths)]
        parts, begin = [], torch.zeros_like(places)
        for codec, end in zip(["exact", *codecs], ends, strict=False):
            there = (begin <= places) & (places < end)
            counts = there.new_zeros(len(lengths), dtype=torch.int32).index_add_(
                0, torch.arange(len(lengths), device=device).repeat_interleave(lengths), there.int()
            )
            bounds = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
            rows = inputs.keys[there], inputs.values[there]
            forms = {**CODECS, "k4v2": ("int4", "int2")}.get(codec)
            parts.append(
                Part(*rows, bounds)
                if forms is None
                else Part(encode_rows(rows[0], forms[0]), encode_rows(rows[1], forms[1]), bounds)
            )
            begin = end
        nothing = inputs.keys.new_empty(0)
        return cls(replace(inputs, keys=nothing, values=nothing), parts)

    @property
    def nbytes(self) -> int:
        """Bytes of pairs and scales."""
        return sum(part.keys.nbytes + part.values.nbytes for part in self.parts)

    def attend(self, impl: str | None) -> Tensor:
        """Runs the op."""
        own = self.inputs
        out = parted_attention(own.query, self.parts, own.tail_keys, own.tail_values, impl=impl)
        assert isinstance(out, Tensor)
        return out

    def exact(self) -> Tensor:
        """Attention to the decoded rows in fp64."""
        names = ("query", "tail_keys", "tail_values")
        exact = replace(self.inputs, **{name: getattr(self.inputs, name).double() for name in names})
        first, *coded = self.parts
        assert isinstance(first.keys, Tensor)
        assert isinstance(first.values, Tensor)
        first = replace(first, keys=first.keys.double(), values=first.values.double())
        return replace(self, inputs=exact, parts=[first, *coded]).attend("merged")


def main() -> None:
    """Runs the cases that the command line asks for: first the product's choices, then others."""
    bench, cases = start("codecs", CASES)
    until = time.monotonic() + SECONDS
    try:
        measure_all(bench, cases, until)
    finally:
        bench.finish()


@torch.inference_mode()
def measure_all(bench: Bench, cases: Sequence[DecodeCase], until: float) -> None:
    """Measures bf16 and codecs on all cases, then tails and parts, then other block sizes, until the time is over."""
    jobs: list[tuple[DecodeCase, str, Callable[[], None]]] = []
    for case in cases:
        jobs.append((case, "bf16", partial(measure_rows, bench, case)))
        jobs += [(case, codec, partial(measure, bench, case, codec, 0, [None])) for codec in ASKED_FOR]
    jobs += [(cases[0], codec, partial(measure, bench, cases[0], codec, TAIL, [None])) for codec in CODECS]
    jobs += [(cases[0], name, partial(measure_parts, bench, cases[0], name)) for name in PARTED]
    for case in cases:
        configs = [config for config in CONFIGS if case.head_dim <= 128 or config.block_n <= 64]
        jobs += [(case, codec, partial(measure, bench, case, codec, 0, configs, until)) for codec in ASKED_FOR]
    for case, name, job in jobs:
        if time.monotonic() > until:
            return
        try:
            job()
        except (WrongResultError, RuntimeError, ValueError, TypeError, AttributeError) as reason:
            bench.skip(case, name, reason)
        bench.write()


def measure(
    bench: Bench, case: DecodeCase, codec: str, tail: int, configs: Sequence[Config | None], until: float = float("inf")
) -> None:
    """Measures a codec on a case with each of some block sizes."""
    first = Coded.of(DecodeInputs.random(case, bench.device), codec)
    more = (DecodeInputs.random(case, bench.device) for _ in range(copies_for(first.nbytes) - 1))
    copies = [first, *(Coded.of(inputs, codec) for inputs in more)]
    exact = [copy.exact(tail) for copy in (copies[0], copies[-1])]
    n_bytes = first.nbytes + (first.inputs.tail_bytes() if tail else 0)
    for config in configs:
        if time.monotonic() > until:
            return
        blocks = (
            "" if config is None else f", {config.block_n} rows, {config.num_stages} stages x {config.programs_per_sm}"
        )
        try:
            bench.measure(
                case,
                f"{codec}, tail {tail}{blocks}",
                partial(calls_of, copies, tail, config),
                exact=exact,
                limit=ERROR_LIMIT,
                may_raise=(Exception,),
                n_bytes=n_bytes,
            )
        except WrongResultError as reason:
            bench.skip(case, f"{codec}{blocks}", reason)


def measure_parts(bench: Bench, case: DecodeCase, name: str) -> None:
    """Measures parts and a tail in one launch, and with a launch for each part."""
    first = InParts.of(DecodeInputs.random(case, bench.device), PARTED[name])
    more = (DecodeInputs.random(case, bench.device) for _ in range(copies_for(first.nbytes) - 1))
    copies = [first, *(InParts.of(inputs, PARTED[name]) for inputs in more)]
    exact = [copy.exact() for copy in (copies[0], copies[-1])]
    for impl, how in ((IMPL, "one launch"), ("merged", "a launch for each part")):
        bench.measure(
            case,
            f"{name} behind {FIRST} exact tokens, tail {TAIL}, {how}",
            partial(parted_calls_of, copies, impl),
            exact=exact,
            limit=ERROR_LIMIT,
            may_raise=(Exception,),
            n_bytes=first.nbytes + first.inputs.tail_bytes(),
        )


def measure_rows(bench: Bench, case: DecodeCase) -> None:
    """Measures the same pairs in bf16."""
    first = DecodeInputs.random(case, bench.device)
    copies = [first, *(DecodeInputs.random(case, bench.device) for _ in range(copies_for(first.context_bytes()) - 1))]

    def attend(own: DecodeInputs) -> Tensor:
        out = ragged_attention(own.query, own.keys, own.values, own.cu_seqlens, impl=IMPL)
        assert isinstance(out, Tensor)
        return out

    bench.measure(
        case, "bf16, tail 0", lambda: [partial(attend, copy) for copy in copies], n_bytes=first.context_bytes()
    )


def calls_of(copies: Sequence[Coded], tail: int, config: Config | None) -> list[Call]:
    """Returns a call for each copy of the inputs."""
    return [partial(copy.attend, tail, config, IMPL) for copy in copies]


def parted_calls_of(copies: Sequence[InParts], impl: str | None) -> list[Call]:
    """Returns a call for each copy of the inputs."""
    return [partial(copy.attend, impl) for copy in copies]


if __name__ == "__main__":
    main()
