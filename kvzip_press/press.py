"""The base classes of presses: hyper-parameters that name a scorer and a policy, without the state of any run."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NoReturn

from kvzip_press.arguments.model import check_model
from kvzip_press.budget.allocators import SAFEGUARD, AllocationLike, allocation_of
from kvzip_press.budget.amount import Amount, LayerRatios, Ratio, amount_of, check_compression_ratio
from kvzip_press.budget.policy import Policy
from kvzip_press.budget.scores import Scores
from kvzip_press.cache.codecs.by_name import storage_named
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.prefilling.whole import Observer, Prefill
from kvzip_press.session import compressing

if TYPE_CHECKING:
    from torch import nn

    from kvzip_press.decoding.eviction import DecodeEviction, Schedule


@dataclass(frozen=True)
class Press(ABC):
    """A KV-cache compression method.

    ``with press(model):`` compresses the cache at the end of every prefill inside, ``model.generate`` included.

    Args:
        compression_ratio: Fraction of key/value pairs removed, in [0, 1).
        budget: How many tokens' worth of pairs a row keeps, instead of a ratio; an int of at least 1. A head keeps that
            many pairs on average over its pool, so a row keeps ``budget * heads * layers``. Protected pairs are
            included if the press counts them towards the budget (``protected_count``), and come on top otherwise. A
            shorter context is not compressed. Over several turns the budget is one for the total: what a row still
            holds of earlier turns, and the tokens between them, which all stay, are subtracted, and the new turn gets
            the rest (at least one pair per layer). So it bounds a whole conversation; one that outgrows it keeps next
            to nothing of its last turn.
        storage: How kept pairs are stored: "model" (as the model made them), or a name of
            :data:`kvzip_press.cache.codecs.by_name.STORAGES`, in fewer bytes; "tiers" may be followed by a rule, as in
            "tiers:0.25" (:class:`kvzip_press.cache.codecs.tiers.Tiers`). What the model reads or writes later stays as
            it is until it is packed. A later turn is stored as the cache already is.

    Raises:
        InvalidArgumentError: A value is out of range, a ratio and a budget are both given, or there is no storage of
            this name.
    """

    compression_ratio: float = 0.0
    budget: int | None = field(default=None, kw_only=True)
    storage: str = field(default="model", kw_only=True)

    #: True if it only scores and the core spends its budget; False if it decides itself how many pairs each head keeps.
    is_scorer = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A value of another kind is refused before the class compares it with its range.
        if "__post_init__" in cls.__dict__:
            setattr(cls, "__post_init__", _checked_fields(cls.__post_init__))  # noqa: B010  # mypy, as below
        # What an author returns is checked, and named, here; and a budget is applied: scorers need no code for it.
        if "score" in cls.__dict__:
            setattr(cls, "score", _checked_score(cls.score))  # noqa: B010  # mypy: a method is not assigned to
        if "observer" in cls.__dict__:
            setattr(cls, "observer", _checked_observer(cls.observer))  # noqa: B010  # mypy, as above

    def __post_init__(self) -> None:
        with _named(self):
            _check_kinds(self)
            policy, amount = self.policy, self.amount  # raises for values out of range
            storage_named(self.storage)
        if not isinstance(policy, Policy) or not isinstance(amount, Amount):
            name = type(self).__name__
            raise InvalidArgumentError(
                f"{name}: expected {name}.policy to be a Policy and {name}.amount an Amount, got "
                f"{type(policy).__name__} and {type(amount).__name__}"
            )

    def __str__(self) -> str:
        """Returns the press in short: its class, and the fields that differ from their defaults."""
        values = [(one.name, getattr(self, one.name), one.default) for one in fields(self) if one.repr and one.init]
        changed = [f"{name}={_shown(value)}" for name, value, default in values if not _is_same(value, default)]
        return f"{type(self).__name__}({', '.join(changed)})"

    @property
    def amount(self) -> Amount:
        """How much is kept, according to the fields."""
        return amount_of(check_compression_ratio(self.compression_ratio), self.budget)

    @property
    def policy(self) -> Policy:
        """How much is kept and how pairs compete for it, according to the fields; :meth:`score` passes it on."""
        return Policy(self.amount)

    @property
    def context_budget(self) -> int | None:
        """The budget that :meth:`score` is asked for: ``budget``; None for what the scores say themselves."""
        return self.budget

    @abstractmethod
    def score(self, prefill: Prefill) -> Scores:
        """Scores every pair of the prefill's span. The prefill and its cache are not changed."""

    def observer(self, model: nn.Module) -> Observer | None:
        """Returns a fresh observer, for scorers that have to see the prefill run (hidden states, queries), or None."""
        return None

    @property
    def schedule(self) -> Schedule | None:
        """When pairs are evicted while the model generates; None if they are not."""
        return None

    @property
    def evicts_while_decoding(self) -> bool:
        """Whether pairs are also evicted while the model generates."""
        return self.schedule is not None

    def with_ratio(self, compression_ratio: float, *, storage: str | None = None) -> Press:
        """Returns the press with another ratio and, if one is given, another storage.

        Raises:
            InvalidArgumentError: It has no ratio of its own to change (a composition, or a press with a budget in
                tokens or a ratio for each layer), or a value is out of range.
        """
        if not isinstance(self.amount, Ratio) or not any(
            one.name == "compression_ratio" and one.init for one in fields(self)
        ):
            raise InvalidArgumentError(f"expected a press with a compression_ratio of its own to change, got {self}")
        return replace(self, compression_ratio=compression_ratio, storage=self.storage if storage is None else storage)

    def requires(self, model: nn.Module) -> None:  # noqa: B027  # most presses need nothing
        """Looks for what the press needs for a model besides the model's own weights: gates, scores of heads.

        Raises:
            InvalidArgumentError: Something is missing or does not fit the model. The message says how to get it.
        """

    def decode_eviction(self, model: nn.Module) -> DecodeEviction | None:
        """Returns what evicts while the model generates, for one ``with press(model):``; None if nothing does."""
        return None

    def __call__(self, model: Any, *, cold: str | None = None) -> AbstractContextManager[None]:
        """Compresses every prefill of ``model`` inside the context, in place in the cache that the model used.

        Args:
            model: A causal language model.
            cold: "cpu" to keep what is evicted in host memory, so that ``RaggedCache.of(cache).restore()`` can bring it
                back; None keeps none.

        Raises:
            InvalidArgumentError: What is given is no model; or ``cold`` is something else, or is given with a press
                that evicts while the model generates.
            UnsupportedModelError: The model has no layer that can be compressed.
            KVzipPressError: The model is already inside ``with press(model):``.
        """
        check_model(model, "with press(model)")
        return compressing(self, model, cold=cold)

    def __enter__(self) -> NoReturn:
        """Raises InvalidArgumentError: a press alone does not know the model."""
        raise InvalidArgumentError("expected a model: write `with press(model):`, got `with press:`")

    def __exit__(self, *_: object) -> None:  # noqa: B027  # not abstract: it is the same for all
        """Is never reached; Python looks for it before it enters."""


def _is_same(value: object, default: object) -> bool:
    return value is default or (isinstance(value, str | int | float) and value == default)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return str(value) if isinstance(value, Press) else f"{value!r:.60}"


@contextmanager
def _named(press: Press, method: str = "") -> Iterator[None]:
    """Names the press, and its method, in what is raised about a value that it was given or returned."""
    name = type(press).__name__
    try:
        yield
    except InvalidArgumentError as error:
        if name in str(error):
            raise
        raise InvalidArgumentError(f"{name}{method}: {error}") from error


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and value == value  # noqa: PLR0124  # NaN is not


_KINDS = {"bool": ("True or False", _is_bool), "int": ("an int", _is_int), "float": ("a number", _is_number)}


def _check_kinds(press: Press) -> None:
    """Raises InvalidArgumentError for a field that is declared as bool, int or float and holds something else, or NaN.

    Fields of wider types (``float | None``) are their class's own to check, and so are ranges.
    """
    for one in fields(press):
        declared: Any = getattr(one.type, "__name__", one.type)  # a text under `from __future__ import annotations`
        if declared not in _KINDS or not one.init or one.name == "compression_ratio":  # which the amount explains
            continue
        (what, is_one), value = _KINDS[declared], getattr(press, one.name)
        if not is_one(value):
            raise InvalidArgumentError(f"expected {one.name} to be {what}, got {value!r:.80}")


def _checked_fields(post_init: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(post_init)
    def checked(self: Press) -> None:
        with _named(self):
            _check_kinds(self)
        post_init(self)

    return checked


def _checked_score(score: Callable[[Any, Prefill], Scores]) -> Callable[[Any, Prefill], Scores]:
    @functools.wraps(score)
    def scored(self: Press, prefill: Prefill) -> Scores:
        with _named(self, ".score"):
            if not isinstance(prefill, Prefill):
                raise InvalidArgumentError(
                    "expected a Prefill, which prefill(model, tokenizer, context) returns, got "
                    f"{type(prefill).__name__}"
                )
            scores = score(self, prefill)
            prefill.check(scores)
            budget = self.context_budget
            asked = scores if budget is None else scores.asked_for(budget=budget)
            return prefill.attended(asked).made_by(str(self), self.storage)

    return scored


def _checked_observer(observer: Callable[[Any, nn.Module], Any]) -> Callable[[Any, nn.Module], Any]:
    @functools.wraps(observer)
    def observed(self: Press, model: nn.Module) -> Any:
        found = observer(self, model)
        missing = [name for name in ("__enter__", "__exit__", "scores") if not callable(getattr(found, name, None))]
        if missing and not (found is None and not isinstance(self, ObservingPress)):
            raise InvalidArgumentError(
                f"{type(self).__name__}.observer: expected a context manager with a method `scores`, got "
                f"{type(found).__name__} without {', '.join(missing)}"
            )
        return found

    return observed


@dataclass(frozen=True)
class AllocatingPress(Press):
    """A press that lets its user choose how pairs compete for the budget.

    Args:
        compression_ratio: Fraction of key/value pairs removed, in [0, 1).
        allocation: "global" (all pairs of all layers and heads compete), "layer" (every layer keeps the same fraction,
            its heads compete), "head" (every head keeps the same fraction), "adakv" (like "layer", with a safeguard),
            another name of :data:`kvzip_press.budget.allocators.ALLOCATIONS`, or an
            :class:`kvzip_press.budget.allocators.Allocation`, which has its own floors; in files, a mapping with the
            name and arguments of one (``{name: pages, page_size: 64}``).
        budget: Tokens' worth of pairs to keep, instead of a ratio; see :class:`Press`.
        layer_ratios: A ratio for each layer instead of one for all, by layer index, as a mapping or a sequence; for
            exactly the layers that can be compressed. Not with allocation "global".
        safeguard: For "adakv": the fraction of its equal share (the layer's budget of unprotected pairs divided by its
            heads) that every head keeps, rounded down; in [0, 1]. AdaKV's alpha.
        min_kept_per_head: Number of unprotected pairs that every head keeps at least, as part of the budget, as far as
            its context and the budget allow: a budget too small for all these floors is spent on heads in turns, one
            pair each, better pairs first.

    Raises:
        InvalidArgumentError: A value is out of range, or more than one of ratio, budget and layer ratios is given.
    """

    allocation: AllocationLike = "global"
    layer_ratios: Mapping[int, float] | Sequence[float] | None = field(default=None, kw_only=True)
    safeguard: float = field(default=SAFEGUARD, kw_only=True)
    min_kept_per_head: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if self.layer_ratios is not None:
            object.__setattr__(self, "layer_ratios", LayerRatios(self.layer_ratios))
        if isinstance(self.allocation, Mapping):
            with _named(self):
                object.__setattr__(self, "allocation", allocation_of(self.allocation))
        super().__post_init__()

    @property
    def policy(self) -> Policy:
        """How much is kept and how pairs compete for it, according to the fields."""
        return Policy.of(
            check_compression_ratio(self.compression_ratio),
            self.allocation,
            budget=self.budget,
            layer_ratios=self.layer_ratios,
            safeguard=self.safeguard,
            min_kept_per_head=self.min_kept_per_head,
        )

    @property
    def amount(self) -> Amount:
        """How much is kept, according to the fields."""
        return self.policy.amount


@dataclass(frozen=True)
class ObservingPress(Press):
    """A press whose scores come from watching the prefill."""

    @abstractmethod
    def observer(self, model: nn.Module) -> Observer:
        """Returns a fresh observer of one prefill."""

    def score(self, prefill: Prefill) -> Scores:
        """Returns the scores of the observer that watched this prefill, or of one that watches it run once more.

        Raises:
            InvalidArgumentError: The prefill would have to run once more, but is not the whole context or has no token
                ids.
        """
        return prefill.observed(self).scores(prefill)
