"""kvpress's presses by name, as the registry makes them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from kvzip_press.errors import InvalidArgumentError, did_you_mean
from kvzip_press.presses.kvpress_adapter.importing import kvpress
from kvzip_press.presses.kvpress_adapter.ragged_press import RaggedPress


@dataclass(frozen=True)
class Recipe:
    """How to make a press: kvpress's classes from the outermost in; the innermost takes the ratio.

    Attributes:
        classes: Names of the classes; each but the last takes the next as its ``press``.
        ratio: The innermost class's name for the ratio.
    """

    classes: tuple[str, ...]
    ratio: str = "compression_ratio"

    def __call__(self, compression_ratio: float = 0.0, *, storage: str = "model", **options: Any) -> RaggedPress:
        """Makes the press.

        Args:
            compression_ratio: Fraction of pairs removed, in [0, 1).
            storage: How kept pairs are stored: see :class:`kvzip_press.press.Press`.
            options: Arguments of the classes; each goes to the outermost class that takes it.

        Raises:
            InvalidArgumentError: No class takes an option, or kvpress refuses a value.
            MissingDependencyError: kvpress is missing, or a version is outside the range that works.
        """
        classes = [getattr(kvpress(), name) for name in self.classes]
        arguments: list[dict[str, Any]] = [{} for _ in classes]
        for name, value in options.items():
            taken = [i for i, cls in enumerate(classes) if name in _options_of(cls)]
            if not taken:
                known = sorted({option for cls in classes for option in _options_of(cls)} - {self.ratio})
                raise InvalidArgumentError(
                    f"expected options of {' of '.join(self.classes)} among {', '.join(known)}, got {name!r:.80}"
                    f"{did_you_mean(name, known)}"
                )
            arguments[taken[0]][name] = value
        press: Any = None
        arguments[-1][self.ratio] = compression_ratio
        try:
            for cls, own in zip(reversed(classes), reversed(arguments), strict=True):
                press = cls(**own) if press is None else cls(press=press, **own)
        except (AssertionError, TypeError) as error:
            raise InvalidArgumentError(f"{' of '.join(self.classes)} refused {options}: {error}") from error
        return RaggedPress(press, storage=storage)


def _options_of(cls: type) -> set[str]:
    return set(inspect.signature(cls).parameters) - {"press"}


adakv_expected_attention = Recipe(("AdaKVPress", "ExpectedAttentionPress"))
adakv_snapkv = Recipe(("AdaKVPress", "SnapKVPress"))
cap = Recipe(("CapPress",))
chunkkv_snapkv = Recipe(("ChunkKVPress", "SnapKVPress"))
compactor = Recipe(("CompactorPress",))
criticaladakv_expected_attention = Recipe(("CriticalAdaKVPress", "ExpectedAttentionPress"))
criticalkv_snapkv = Recipe(("CriticalKVPress", "SnapKVPress"))
cur = Recipe(("CURPress",))
kvcompose = Recipe(("KVComposePress",))
#: Here the ratio is the fraction of heads that keep only the sink and the recent tokens.
kvpress_duo_attention = Recipe(("DuoAttentionPress",), ratio="head_compression_ratio")
kvpress_expected_attention = Recipe(("ExpectedAttentionPress",))
kvpress_fastkvzip = Recipe(("FastKVzipPress",))
kvpress_keydiff = Recipe(("KeyDiffPress",))
kvpress_knorm = Recipe(("KnormPress",))
kvpress_kvzip = Recipe(("KVzipPress",))
kvpress_pyramidkv = Recipe(("PyramidKVPress",))
kvpress_snapkv = Recipe(("SnapKVPress",))
kvpress_streaming_llm = Recipe(("StreamingLLMPress",))
kvpress_tova = Recipe(("TOVAPress",))
lagkv = Recipe(("LagKVPress",))
leverage = Recipe(("LeverageScorePress",))
lukv = Recipe(("LUKVPress",))
observed_attention = Recipe(("ObservedAttentionPress",))
qfilter = Recipe(("QFilterPress",))
