"""What weighting KVzip's rows by surprisal costs: the head in the prefill, and the weights in the scoring.

``python -m kvzip_press.leaderboard.benchmarks.weighting --model Qwen/Qwen2.5-Coder-0.5B-Instruct --tokens 16000`` times
it; with ``--shape qwen2.5-0.5b`` a model of that shape with random weights is timed instead, and
``--calculate`` (with ``--shape`` or ``--model``) times nothing and prints what share of the scoring's FLOPs the head's
are, at several lengths. On a CPU times are those of the process, which others on the machine disturb less.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvzip_press import Press, get_press, prefill
from kvzip_press.leaderboard.benchmarks.following import samples_of
from kvzip_press.leaderboard.profile.shapes import get_shape, random_model
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.loading.by_name import load_on
from kvzip_press.model.devices import get_device, get_dtype, input_device, synchronize
from kvzip_press.model.structure import text_config, text_decoder
from kvzip_press.terminal import plain
from kvzip_press.testing import ByteTokenizer

LENGTHS = (1000, 4000, 16000, 64000)


def main(
    model: Annotated[str, typer.Option(help="Path or hub id of a model, or smollm2.")] = "smollm2",
    shape: Annotated[str | None, typer.Option(help="A shape with random weights, instead of a model.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the context.")] = 1000,
    repeats: Annotated[int, typer.Option(help="Measurements of each, in turns; medians are shown.")] = 5,
    calculate: Annotated[bool, typer.Option(help="Print shares of FLOPs, and time nothing.")] = False,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32, of random weights; default bf16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default the GPU if any.")] = None,
) -> None:
    """Runs the comparison and prints it."""
    loaded: Any
    tokenizer: Any
    if shape is not None:
        where = torch.device("meta") if calculate else get_device(device)
        loaded = random_model(get_shape(shape), where, get_dtype(dtype or "bf16") or torch.bfloat16)
        tokenizer = ByteTokenizer()
    else:
        loaded, tokenizer = load_on(model, device)
    name = shape or model
    if calculate:
        Console().print(_calculated(loaded, name))
        return
    task = get_task("hidden_facts", n_keys=4)
    context = samples_of(tokenizer, task, 1, tokens, seed=1)[0].context
    presses = {
        (replay, weighting): get_press(f"kvzip{replay}", weighting=weighting)
        for replay in ("", "_local")
        for weighting in (None, "surprisal")
    }
    seconds: dict[tuple[str, str | None], list[tuple[float, float]]] = {key: [] for key in presses}
    for turn in range(repeats + 1):
        for key, press in presses.items():
            if measured := _seconds(loaded, tokenizer, context, press):
                seconds[key] += [measured] if turn else []  # the first turn warms up
    table = Table("press", "weighting", "prefill s", "scoring s", "more than without, of scoring")
    medians = {key: [statistics.median(part) for part in zip(*found, strict=True)] for key, found in seconds.items()}
    for (replay, weighting), (read, scored) in medians.items():
        base = medians[replay, None]
        more = "" if weighting is None else f"{(read - base[0] + scored - base[1]) / base[1]:+z.1%}"
        table.add_row(f"kvzip{replay}", weighting or "none", f"{read:.4f}", f"{scored:.4f}", more)
    Console().print(table)
    Console().print(plain(f"{name}, {tokens} tokens, medians of {repeats} runs in turns"))


@dataclass(frozen=True)
class ScoringFlops:
    """FLOPs of scoring a context, each product counted once: a multiplication and an addition are two.

    Attributes:
        layers: The products with the weights of all layers.
        attention: Attention of the replayed tokens: to the whole context, or to their own chunk.
        scores: The logits that scores are made of.
        head: The head's product for each token of the context, which weighting by surprisal adds.
    """

    layers: float
    attention: float
    scores: float
    head: float

    @property
    def head_share(self) -> float:
        """The head's FLOPs over those of a scoring that does without."""
        return self.head / (self.layers + self.attention + self.scores)

    @classmethod
    def of(cls, model: Any, n_tokens: int, *, chunk_size: int = 2048, local: bool = False) -> "ScoringFlops":
        """Returns them for a dense decoder: all its matrices take part for each token. Prompts are left out.

        Args:
            model: The model; one on the meta device will do.
            n_tokens: Tokens of the context.
            chunk_size: Tokens that are replayed at a time.
            local: Whether the replay attends to its own chunk only.
        """
        config, layers = text_config(model), text_decoder(model).layers
        assert isinstance(layers, torch.nn.ModuleList)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = config.num_attention_heads * head_dim * config.num_hidden_layers
        chunk = min(chunk_size, n_tokens)
        past = chunk if local else n_tokens
        matrices = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
        return cls(
            layers=2.0 * matrices * n_tokens,
            attention=4.0 * width * (past + chunk / 2) * n_tokens,
            scores=2.0 * width * chunk * n_tokens if local else 2.0 * width * (chunk + chunk / 2) * n_tokens,
            head=2.0 * config.hidden_size * config.vocab_size * n_tokens,
        )


def _calculated(model: Any, name: str, lengths: Sequence[int] = LENGTHS) -> Table:
    table = Table(
        "tokens", "full replay", "local replay", title=plain(f"{name}: the head's FLOPs, of scoring's", "table.title")
    )
    for n_tokens in lengths:
        shares = [ScoringFlops.of(model, n_tokens, local=local).head_share for local in (False, True)]
        table.add_row(str(n_tokens), *(f"{share:.1%}" for share in shares))
    return table


def _seconds(model: Any, tokenizer: object, context: str, press: Press) -> tuple[float, float]:
    """Returns the seconds of a prefill that the press watches, and of scoring it."""
    device = input_device(model)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize(device)
    begin = clock()
    done = prefill(model, tokenizer, context, observers=[press])
    synchronize(device)
    read = clock()
    press.score(done)
    synchronize(device)
    return read - begin, clock() - read


if __name__ == "__main__":
    typer.run(main)
