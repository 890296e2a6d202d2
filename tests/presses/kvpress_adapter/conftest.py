"""What the adapter's tests share: tiny models, every press of kvpress, and what kvpress itself makes of a context."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LAYERS, HEADS, GROUPS, DIM, VOCABULARY = 3, 2, 2, 16, 400


@pytest.fixture
def tiny_model(tokenizer_folder: Path) -> Callable[..., Any]:
    """A random Llama, the same at every call, whose path leads to a tokenizer."""

    def make(attn_implementation: str = "sdpa", head_dim: int = DIM) -> Any:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS * GROUPS,
            num_key_value_heads=HEADS,
            head_dim=head_dim,
            max_position_embeddings=8192,
            initializer_range=0.2,  # large enough that evicting a pair shows in the logits
            attn_implementation=attn_implementation,
        )
        torch.manual_seed(1)
        model = LlamaForCausalLM(config).eval()
        model.config.name_or_path = str(tokenizer_folder)
        return model

    return make


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of words on disk, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"<unk>": VOCABULARY - 1}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    tokenizer.chat_template = (
        "w391 w392 {{ messages[0]['content'] }} w393{% if add_generation_prompt %} w394{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def context() -> Callable[..., torch.Tensor]:
    """``[batch, n]`` ids in random order, none twice in a row: equal tokens may score equal in the first layer, and of
    equal scores kvpress keeps whichever ``topk`` happens to return."""

    def make(n: int = 150, batch: int = 1, seed: int = 2) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([torch.randperm(VOCABULARY - 2, generator=generator)[:n] + 1 for _ in range(batch)])

    return make


@pytest.fixture(scope="session")
def kvpress() -> Any:
    """The package, imported as the adapter imports it: nothing of transformers is changed for other tests."""
    from kvzip_press.presses.kvpress_adapter.importing import kvpress

    return kvpress()


@pytest.fixture
def as_kvpress_patches(kvpress: Any) -> Callable[[], Any]:
    """A context in which transformers is as after a user's own ``import kvpress``."""

    @contextmanager
    def patched() -> Iterator[None]:
        before = dict(ALL_ATTENTION_FUNCTIONS)
        kvpress.attention_patch.patch_attention_functions()
        try:
            yield
        finally:
            for name, function in before.items():
                del ALL_ATTENTION_FUNCTIONS[name]
                if ALL_ATTENTION_FUNCTIONS[name] is not function:
                    ALL_ATTENTION_FUNCTIONS[name] = function

    return patched


@pytest.fixture
def make_press(kvpress: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A kvpress press by class name, at ratio 0.6 where it has one; those that load weights get small random ones."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(3))

    def stats(**options: Any) -> Any:
        press = kvpress.ExpectedAttentionStatsPress(**options)
        press.mu = random(LAYERS, HEADS * GROUPS, DIM)
        press.cov = torch.eye(DIM).expand(LAYERS, HEADS * GROUPS, DIM, DIM)
        return press

    def fastkvzip(**options: Any) -> Any:
        press = kvpress.FastKVzipPress(**options)
        gate = kvpress.presses.fastkvzip_press.FastKVzipGate
        torch.manual_seed(3)
        press.gates = [gate(i, 64, HEADS, GROUPS, torch.float32) for i in range(LAYERS)]
        return press

    def lukv(**options: Any) -> Any:
        press = kvpress.LUKVPress(**options)
        press._budget_curves = torch.rand(99, LAYERS, HEADS, generator=torch.Generator().manual_seed(3)).numpy()
        return press

    def kvzap(**options: Any) -> Any:
        module = kvpress.presses.kvzap_press
        torch.manual_seed(3)
        weights = module.KVzapModel(module.KVzapConfig(input_dim=64, output_dim=HEADS, n_modules=LAYERS))
        monkeypatch.setattr(module.KVzapModel, "from_pretrained", staticmethod(lambda name: copy.deepcopy(weights)))
        return kvpress.KVzapPress(**options)

    def qfilter(**options: Any) -> Any:
        filters = torch.nn.Parameter(random(LAYERS, HEADS, DIM), requires_grad=False)
        monkeypatch.setattr(kvpress.QFilterPress, "load_q_filters", staticmethod(lambda name: filters))
        return kvpress.QFilterPress(**options)

    def duo(compression_ratio: float) -> Any:
        pattern = (4, 16, random(LAYERS, HEADS).abs().numpy())
        monkeypatch.setattr(kvpress.DuoAttentionPress, "load_attention_pattern", staticmethod(lambda model: pattern))
        return kvpress.DuoAttentionPress(head_compression_ratio=compression_ratio)

    def around(name: str, **own: Any) -> Callable[..., Any]:
        return lambda **options: getattr(kvpress, name)(press=kvpress.SnapKVPress(window_size=16, **options), **own)

    special: dict[str, Callable[..., Any]] = {
        "AdaKVPress": around("AdaKVPress"),
        "BlockPress": lambda **options: kvpress.BlockPress(kvpress.KnormPress(**options), block_size=40),
        "ChunkKVPress": around("ChunkKVPress"),
        "ChunkPress": lambda **options: kvpress.ChunkPress(kvpress.KnormPress(**options), chunk_length=40),
        "ComposedPress": lambda **options: kvpress.ComposedPress([kvpress.KnormPress(0.2), kvpress.KeyDiffPress(0.5)]),
        "CriticalAdaKVPress": around("CriticalAdaKVPress"),
        "CriticalKVPress": around("CriticalKVPress"),
        "DMSPress": lambda **options: kvpress.DMSPress(kvpress.KnormPress(), threshold=-6.4, sliding_window_size=30),
        "DuoAttentionPress": duo,
        "EntropyGatedChunkKVPress": around("EntropyGatedChunkKVPress"),
        "ExpectedAttentionStatsPress": stats,
        "FastKVzipPress": fastkvzip,
        "KVComposePress": lambda **options: kvpress.KVComposePress(structured=False, **options),
        "KVComposePress structured": lambda **options: kvpress.KVComposePress(structured=True, **options),
        "KVzapPress": kvzap,
        "LagKVPress": lambda **options: kvpress.LagKVPress(lag_size=32, **options),
        "LUKVPress": lukv,
        "PerLayerCompressionPress": lambda **options: kvpress.PerLayerCompressionPress(
            kvpress.KnormPress(), [0.9, 0.6, 0.3]
        ),
        "PyramidKVPress": lambda **options: kvpress.PyramidKVPress(window_size=4, beta=4, **options),
        "QFilterPress": qfilter,
        "RandomPress": lambda **options: kvpress.RandomPress(seed=5, **options),
        "SimLayerKVPress": lambda **options: kvpress.SimLayerKVPress(lazy_threshold=0.18, n_recent=40),
        "SnapKVPress": lambda **options: kvpress.SnapKVPress(window_size=16, **options),
    }

    def make(name: str, compression_ratio: float = 0.6) -> Any:
        return special.get(name) or getattr(kvpress, name)

    return lambda name, compression_ratio=0.6: make(name)(compression_ratio=compression_ratio)


class Native:
    """What kvpress itself makes of a context, on a copy of the model: pairs masked on modules, or a shorter cache."""

    def __init__(self, model: Any, press: Any, input_ids: torch.Tensor) -> None:
        self.model, self.n = copy.deepcopy(model), input_ids.shape[1]
        self.cache = DynamicCache(config=model.config)
        torch.manual_seed(7)
        with torch.no_grad(), press(self.model):
            self.model.model(input_ids=input_ids, past_key_values=self.cache, use_cache=True)
        self.length = self.cache.get_seq_length()
        if type(press).__name__ == "KVComposePress":
            self.cache.crop(self.n)  # kvpress leaves the tokens that it replayed behind the context

    @property
    def kept(self) -> list[torch.Tensor] | None:
        """``[layer] -> [heads, n]``, bool, of a masking press; None of a press that gathers."""
        masked = [getattr(layer.self_attn, "masked_key_indices", None) for layer in self.model.model.layers]
        if all(indices is None for indices in masked):
            return None
        kept = [torch.ones(HEADS, self.n, dtype=torch.bool) for _ in masked]
        for mask, indices in zip(kept, masked, strict=True):
            if indices is not None:
                mask[indices[1], indices[2]] = False
        return kept

    @torch.no_grad()
    def logits(self, token: int) -> torch.Tensor:
        """Logits ``[vocabulary]`` after one more token; masked pairs are hidden by an exact mask, not by fake keys."""
        kept = self.kept
        for layer_idx, layer in enumerate(self.model.model.layers):
            layer.self_attn.hidden = None if kept is None else ~kept[layer_idx]
        ALL_ATTENTION_FUNCTIONS["masked_for_test"] = _masked_attention
        try:
            self.model.config._attn_implementation = "masked_for_test"
            position = torch.tensor([[self.n]])
            out = self.model(torch.tensor([[token]]), past_key_values=self.cache, position_ids=position)
        finally:
            del ALL_ATTENTION_FUNCTIONS["masked_for_test"]
        return out.logits[0, -1]


def _masked_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """One query over a dense cache from which each head's hidden pairs are left out."""
    key, value = (x.repeat_interleave(GROUPS, dim=1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * kwargs["scaling"]
    if module.hidden is not None:
        hidden = torch.nn.functional.pad(module.hidden, (0, key.shape[2] - module.hidden.shape[1]))
        logits = logits.masked_fill(hidden.repeat_interleave(GROUPS, dim=0)[None, :, None], -torch.inf)
    return (logits.softmax(dim=-1) @ value).transpose(1, 2), None


@pytest.fixture
def native(as_kvpress_patches: Callable[[], Any]) -> Callable[..., Native]:
    """kvpress's own result."""

    def run(model: Any, press: Any, input_ids: torch.Tensor) -> Native:
        with as_kvpress_patches():
            return Native(model, copy.deepcopy(press), input_ids)

    return run


@pytest.fixture
def keep_of() -> Callable[[Any], list[torch.Tensor]]:
    """``[layer] -> [heads, n]``, bool: what the first row of a compressed cache kept."""

    def read(cache: Any) -> list[torch.Tensor]:
        masks = []
        for layer_idx, layer in cache.ragged_layers():
            masks.append(torch.zeros(HEADS, layer.n_context, dtype=torch.bool))
            for head, positions in enumerate(cache.kept_positions(layer_idx)[0]):
                masks[-1][head, positions.long()] = True
        return masks

    return read
