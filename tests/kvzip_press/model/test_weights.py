"""A cache belongs to all weights that make keys and values, and to what chooses among them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kvzip_press import RaggedCache, RandomPress, answer, attach, compress, prefill
from kvzip_press.errors import CacheMismatchError, UnsupportedModelError
from kvzip_press.model.tensor_digest import digests_of
from kvzip_press.model.weights import weights_fingerprint
from kvzip_press.testing import ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()
TEXT = "A context that one set of weights reads, and no other. " * 2
PRESS = RandomPress(0.5)


class Adapted(nn.Module):
    """A linear layer with low-rank adapters, of which one is chosen by name."""

    def __init__(self, base: nn.Linear, names: tuple[str, ...] = ("A", "B")) -> None:
        super().__init__()
        self.base, self.active = base, names[0]
        self.down = nn.ParameterDict({name: torch.randn(4, base.in_features) / 8 for name in names})
        self.up = nn.ParameterDict({name: torch.randn(base.out_features, 4) / 8 for name in names})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down[self.active].T @ self.up[self.active].T


def adapted(place: str = "mlp.up_proj") -> Any:
    model = tiny_model()
    for layer in model.model.layers:
        owner, _, name = place.rpartition(".")
        parent = layer.get_submodule(owner)
        setattr(parent, name, Adapted(getattr(parent, name)))
    return model


def choose(model: Any, name: str) -> None:
    for module in model.modules():
        if isinstance(module, Adapted):
            module.active = name


def refused(model: Any, cache: Any, path: Any) -> None:
    """The cache is refused in memory and, saved before, from its file."""
    with pytest.raises(CacheMismatchError, match="other weights or adapters"):
        answer(model, TOKENIZER, cache, "Whose?", max_new_tokens=2)
    with pytest.raises(CacheMismatchError, match="other weights or adapters"):
        RaggedCache.load(path, model)


@pytest.mark.parametrize("place", ["mlp.up_proj", "self_attn.k_proj", "self_attn.o_proj"])
def test_a_cache_of_one_adapter_is_refused_under_another_and_taken_back(place, tmp_path) -> None:
    model, path = adapted(place), tmp_path / "a.safetensors"
    cache = compress(model, TOKENIZER, TEXT, PRESS)
    expected = answer(model, TOKENIZER, cache, "Whose?", max_new_tokens=4)
    cache.save(path, model=model)
    choose(model, "B")
    refused(model, cache, path)
    with pytest.raises(CacheMismatchError, match=r"first in layers\.0\..*active"):
        cache.save(path, model=model)
    choose(model, "A")
    for one in (cache, RaggedCache.load(path, model)):
        assert answer(model, TOKENIZER, one, "Whose?", max_new_tokens=4) == expected


def add_one(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.view(-1)[-1] += 1


CHANGES: dict[str, Callable[[Any], None]] = {
    "the last value of a projection": lambda model: add_one(model.model.layers[2].self_attn.k_proj.weight),
    "a value of an MLP": lambda model: add_one(model.model.layers[0].mlp.down_proj.weight),
    "a norm": lambda model: add_one(model.model.layers[1].input_layernorm.weight),
    "an embedding": lambda model: add_one(model.model.embed_tokens.weight),
    "two rows that change places": lambda model: model.model.layers[0].mlp.up_proj.weight.data.copy_(
        model.model.layers[0].mlp.up_proj.weight.data.flip(0)
    ),
    "a merge through .data": lambda model: model.model.layers[1].mlp.up_proj.weight.data.add_(0.01),
    "another tensor": lambda model: setattr(
        model.model.layers[0].mlp.up_proj, "weight", nn.Parameter(model.model.layers[1].mlp.up_proj.weight + 1)
    ),
    "a hook that adds": lambda model: _hook(model, nn.Parameter(torch.ones(96))),
}


def _hook(model: Any, delta: nn.Parameter) -> None:
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, args, output: output + delta)


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_changed_are_noticed(change, tmp_path) -> None:
    """Anywhere in the decoder, however the change was made."""
    model, path = tiny_model(), tmp_path / "a.safetensors"
    cache = compress(model, TOKENIZER, TEXT, PRESS)
    cache.save(path)
    answer(model, TOKENIZER, cache, "Whose?", max_new_tokens=2)
    CHANGES[change](model)
    refused(model, cache, path)
    assert answer(model, TOKENIZER, compress(model, TOKENIZER, TEXT, PRESS), "Whose?", max_new_tokens=2)


STEERING = torch.full((64,), 3.0)
ARRAY = np.full(64, 3.0, dtype=np.float32)
VECTORS = {"first": torch.full((64,), 3.0)}
STRENGTH = 2


class Steer:
    """A hook that is an object."""

    def __init__(self) -> None:
        self.vector, self.is_on, self.n_calls = torch.full((64,), 3.0), True, 0

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        self.n_calls += 1
        return output + self.vector if self.is_on else None


class Steered(nn.Module):
    """A module around another, which adds a vector that is an attribute, and keeps what it saw."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.vector, self.seen, self.n_calls = inner, torch.full((64,), 3.0), None, 0
        self.register_buffer("bias", torch.zeros(64), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n_calls += 1
        self.seen = self.inner(x) + self.vector + self.bias
        return self.seen


def hooked(hook: Callable[..., Any]) -> Callable[[Any], None]:
    return lambda model: model.model.layers[0].mlp.register_forward_hook(hook)


def with_forward(wrap: Callable[[Callable[..., Any]], Any]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        mlp = model.model.layers[0].mlp
        mlp.forward = functools.wraps(mlp.forward)(wrap(mlp.forward))

    return change


def around(model: Any) -> None:
    model.model.layers[0].mlp = Steered(model.model.layers[0].mlp)


FUNCTIONS: dict[str, Callable[[Any], None]] = {
    "a constant": hooked(lambda _, args, output: output * 2),
    "a global tensor": hooked(lambda _, args, output: output + STEERING),
    "a global array": hooked(lambda _, args, output: output + torch.from_numpy(ARRAY)),
    "a global number": hooked(lambda _, args, output: output * STRENGTH),
    "a tensor in a dict": hooked(lambda _, args, output: output + VECTORS["first"]),
    "a default": hooked(lambda _, args, output, by=STEERING: output + by),
    "a pre-hook": lambda model: model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: (args[0] + 1,)),
    "an object": hooked(Steer()),
    "a forward in place of the module's": with_forward(lambda forward: lambda x: forward(x) * 2),
    "a module around another": around,
}


@pytest.mark.parametrize("change", FUNCTIONS)
def test_functions_of_others_that_change_an_output_are_noticed(change) -> None:
    """Whatever they compute with: constants, globals, defaults, attributes; beside one that only looks."""
    model, seen = tiny_model(num_layers=1), []
    cache = compress(model, TOKENIZER, TEXT, PRESS)
    answer(model, TOKENIZER, cache, "Whose?", max_new_tokens=2)
    FUNCTIONS[change](model)
    with pytest.raises(CacheMismatchError, match=r"differ first in layers\.0\.mlp"):
        answer(model, TOKENIZER, cache, "Whose?", max_new_tokens=2)
    cache = compress(model, TOKENIZER, TEXT, PRESS)
    model.model.layers[0].mlp.register_forward_hook(lambda _, args, output: seen.append(output))
    assert answer(model, TOKENIZER, cache, "Whose?", max_new_tokens=2)
    assert seen


@pytest.mark.parametrize(
    "change",
    [
        lambda hook: hook.vector.neg_(),
        lambda hook: setattr(hook, "vector", -hook.vector),
        lambda hook: setattr(hook, "is_on", False),
    ],
    ids=["in place", "another tensor", "switched off"],
)
def test_what_a_hook_holds_is_looked_at_again_each_time(change) -> None:
    model, hook = tiny_model(num_layers=1), Steer()
    hooked(hook)(model)
    cache = compress(model, TOKENIZER, TEXT, PRESS)
    answer(model, TOKENIZER, cache, "Whose?", max_new_tokens=2)
    change(hook)
    with pytest.raises(CacheMismatchError, match=r"differ first in layers\.0\.mlp\.hook0"):
        answer(model, TOKENIZER, cache, "Whose?", max_new_tokens=2)


@pytest.mark.parametrize(
    "change",
    [lambda module: module.vector.neg_(), lambda module: module.bias.add_(1)],
    ids=["an attribute", "a buffer that is not saved"],
)
def test_tensors_of_foreign_modules_that_are_no_weights_count(change) -> None:
    model = tiny_model(num_layers=1)
    around(model)
    cache = compress(model, TOKENIZER, TEXT, PRESS)
    answer(model, TOKENIZER, cache, "Whose?", max_new_tokens=2)
    change(model.model.layers[0].mlp)
    with pytest.raises(CacheMismatchError, match=r"differ first in layers\.0\.mlp\."):
        answer(model, TOKENIZER, cache, "Whose?", max_new_tokens=2)


def test_a_cache_remembers_the_weights_that_read_it_not_those_that_were_there_at_its_eviction() -> None:
    model = adapted()
    done = prefill(model, TOKENIZER, TEXT)
    choose(model, "B")
    cache = done.evict(PRESS.score(done))
    with pytest.raises(CacheMismatchError, match="other weights or adapters"):
        answer(model, TOKENIZER, cache, "Whose?", max_new_tokens=2)


def test_what_does_not_make_keys_and_values_changes_nothing(tmp_path) -> None:
    """The head, a hook that gathers what it sees, gradients, the same weights elsewhere."""
    model, path = tiny_model(), tmp_path / "a.safetensors"
    cache, seen = compress(model, TOKENIZER, TEXT, PRESS), []
    cache.save(path)
    expected = answer(model, TOKENIZER, cache, "Whose?", max_new_tokens=4)
    model.model.layers[0].mlp.register_forward_hook(lambda _, args, output: seen.append(output))
    model.requires_grad_(False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    twin = copy.deepcopy(model)
    for other in (model, twin, tiny_model()):
        for one in (cache, RaggedCache.load(path, other)):
            assert answer(other, TOKENIZER, one, "Whose?", max_new_tokens=4) == expected
    assert seen


def test_a_copy_that_was_never_attached_is_asked_to_be() -> None:
    """A model's copy keeps its attention but is not known yet: what its layers are a part of cannot be seen."""
    model = tiny_model()
    cache = compress(model, TOKENIZER, TEXT, PRESS)
    twin = copy.deepcopy(model)
    question = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        with pytest.raises(CacheMismatchError, match=r"attach\(model\)"):
            twin(question, past_key_values=cache.fork())
        attach(twin)
        assert torch.equal(
            twin(question, past_key_values=cache.fork()).logits, model(question, past_key_values=cache.fork()).logits
        )


def test_peft_adapters_count_while_they_are_active(tmp_path) -> None:
    """Switched, disabled, merged, or added and not used; a disabled adapter is the model without it."""
    peft = pytest.importorskip("peft")
    base = tiny_model()
    plain = compress(base, TOKENIZER, TEXT, PRESS)
    config = peft.LoraConfig(r=4, target_modules=["up_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(base, config, adapter_name="A")
        model.add_adapter("B", config)
    ask = {"max_new_tokens": 2}
    path = tmp_path / "a.safetensors"
    cache = compress(model, TOKENIZER, TEXT, PRESS)
    cache.save(path, model=model)
    refuse = pytest.raises(CacheMismatchError, match="other weights or adapters")
    with refuse:
        answer(model, TOKENIZER, plain, "Whose?", **ask)
    model.set_adapter("B")
    refused(model, cache, path)
    model.set_adapter("A")
    assert answer(model, TOKENIZER, RaggedCache.load(path, model), "Whose?", **ask)
    model.add_adapter("C", config)
    assert answer(model, TOKENIZER, cache, "Whose?", **ask)
    with model.disable_adapter():
        assert answer(model, TOKENIZER, plain, "Whose?", **ask)
        refused(model, cache, path)
    merged = model.merge_and_unload(adapter_names=["A"])
    for one in (cache, plain):
        with refuse:
            answer(merged, TOKENIZER, one, "Whose?", **ask)


# Weights of other kinds -------------------------------------------------------------------------------------------


class Wrapped(torch.Tensor):
    """A quantised weight as torchao makes them: int8 and a scale a row, and hardly an operation."""

    @staticmethod
    def __new__(cls, stored: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, stored.shape, dtype=scale.dtype, requires_grad=False)

    def __init__(self, stored: torch.Tensor, scale: torch.Tensor) -> None:
        self.stored, self.scale = stored, scale

    def __tensor_flatten__(self) -> Any:
        return ["stored", "scale"], {"block": 1}

    @classmethod
    def of(cls, weight: torch.Tensor) -> Any:
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def dequantize(self) -> torch.Tensor:
        return self.stored.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].stored, args[0].scale)
        if func in (torch.ops.aten.t.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            return func(*(a.dequantize() if isinstance(a, cls) else a for a in args), **(kwargs or {}))
        raise NotImplementedError(f"{cls.__name__}: {func}")


def wrapped(**options: Any) -> Any:
    model = tiny_model(**options)
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.up_proj):
            linear.weight = nn.Parameter(Wrapped.of(linear.weight.detach()), requires_grad=False)
    return model


def test_quantised_tensors_count_as_they_are_stored(tmp_path) -> None:
    model, path = wrapped(), tmp_path / "a.safetensors"
    cache = compress(model, TOKENIZER, TEXT, PRESS)
    cache.save(path)
    expected = answer(model, TOKENIZER, cache, "Whose?", max_new_tokens=4)
    assert answer(wrapped(), TOKENIZER, RaggedCache.load(path, model), "Whose?", max_new_tokens=4) == expected
    with pytest.raises(CacheMismatchError, match="other weights"):
        answer(wrapped(seed=1), TOKENIZER, cache, "Whose?", max_new_tokens=2)
    model.model.layers[1].mlp.up_proj.weight.stored[-1, -1] += 1
    refused(model, cache, path)


class Opaque(torch.Tensor):
    """A tensor whose data no operation reaches; it may be able to dequantise."""

    plain: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        if self.plain is None:
            raise NotImplementedError("no such kernel")
        return self.plain

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.reshape:
            raise NotImplementedError("no such kernel")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_weight_that_says_nothing_is_dequantised_or_refused_with_the_reason() -> None:
    module = nn.Linear(3, 2)
    weight = nn.Parameter(torch.zeros(2, 3).as_subclass(Opaque), requires_grad=False)
    module.weight = weight
    with pytest.raises(UnsupportedModelError, match=r"Opaque \(2, 3\).*nor dequantises.*no such kernel"):
        weights_fingerprint(module)
    seen = set()
    for value in (0.0, 1.0):
        weight.plain = torch.full((2, 3), value)
        seen.add(weights_fingerprint(module))
    assert len(seen) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.bool])
@pytest.mark.parametrize("size", [0, 1, 7, 8192, 8193, 70_001])
def test_every_single_value_changes_a_digest(size, dtype) -> None:
    """Wherever it lies in the rows of words, in what is left over, in a view, and on its second reading."""
    bits = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(size)).to(dtype)
    whole = torch.cat([bits, bits])
    assert digests_of([whole[size:]]) == digests_of([bits]) == digests_of([bits.clone()])
    seen = set(digests_of([bits]))
    places = sorted({0, size // 3, size - 2, size - 1} & set(range(size)))
    for place in places:
        bits[place] = (1 - bits[place].float()).to(dtype)
        seen |= set(digests_of([bits]))
    assert len(seen) == 1 + len(places)
    assert digests_of([bits.view(torch.uint8)]) != digests_of([bits])
