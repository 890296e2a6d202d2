"""The ragged cache holds what it says, shares what can be shared, and does all that generate asks of a cache."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import DynamicCache

from kvzip_press import RaggedCache, RandomPress, attach, detach
from kvzip_press.cache.tail import BLOCK
from kvzip_press.errors import CacheMismatchError, InvalidArgumentError
from kvzip_press.testing import tiny_model

N = 64


def token_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def compressed(model, batch: int = 1, ratio: float = 0.6) -> RaggedCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), RandomPress(ratio)(model):
        model(token_ids(batch, N), past_key_values=cache)
    return RaggedCache.of(cache)


def logits(model, cache, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def test_resident_bytes_are_the_storages_really_held() -> None:
    """Every tensor of a compressed layer owns storage of exactly its size: nothing keeps the dense cache alive."""
    cache = compressed(tiny_model(), ratio=0.75)
    for _, layer in cache.ragged_layers():
        for tensor in layer.tensors:
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    held = sum(t.untyped_storage().nbytes() for _, layer in cache.ragged_layers() for t in layer.tensors)
    assert cache.resident_bytes == held
    assert cache.dense_bytes == 3 * 2 * N * 16 * 2 * 4


def test_nothing_references_the_dense_cache_after_compression() -> None:
    """The dense tensors are gone from the process once the press has run."""
    model, cache = tiny_model(), DynamicCache()

    def dense() -> list[torch.Tensor]:
        gc.collect()
        return [o for o in gc.get_objects() if type(o) is torch.Tensor and tuple(o.shape) == (1, 2, N, 16)]

    others = dense()  # of tests before this one; held, so that no other tensor gets one's address
    with torch.no_grad(), RandomPress(0.6)(model):
        model(token_ids(1, N), past_key_values=cache)
    known = {id(tensor) for tensor in others}
    assert [tensor.shape for tensor in dense() if id(tensor) not in known] == []


def test_decode_steps_move_nothing_and_allocate_once_a_block() -> None:
    """The tail is appended in place; packed pairs keep their storage."""
    model = tiny_model()
    cache = compressed(model)
    layer = cache.layers[0]
    packed = [tensor.data_ptr() for tensor in layer.packed.tensors]
    logits(model, cache, token_ids(1, 1))
    buffers = [tensor.data_ptr() for tensor in layer.tail.tensors]
    for step in range(BLOCK - 1):
        logits(model, cache, token_ids(1, 1, seed=step))
    assert [tensor.data_ptr() for tensor in layer.tail.tensors] == buffers
    assert [tensor.data_ptr() for tensor in layer.packed.tensors] == packed
    assert cache.get_seq_length() == N + BLOCK
    logits(model, cache, token_ids(1, 1))
    assert [tensor.data_ptr() for tensor in layer.tail.tensors] != buffers


def test_fork_shares_the_context_and_owns_its_tail() -> None:
    """A fork goes its own way; the original answers as if it had never been."""
    model = tiny_model("gemma3_text")
    cache = compressed(model)
    logits(model, cache, token_ids(1, 5, seed=1))
    expected = logits(model, cache.fork(), token_ids(1, 4, seed=2))
    fork = cache.fork()
    logits(model, fork, token_ids(1, 40, seed=3))
    assert fork.layers[1].packed.columns["keys"].data_ptr() == cache.layers[1].packed.columns["keys"].data_ptr()
    assert fork.get_seq_length() == N + 45 and cache.get_seq_length() == N + 5
    assert torch.equal(logits(model, cache, token_ids(1, 4, seed=2)), expected)


def test_truncate_restores_the_context_for_the_next_question() -> None:
    """Ask, truncate, ask again: bit for bit the first answer; no token of the first question is left."""
    model = tiny_model()
    cache = compressed(model)
    first = logits(model, cache, token_ids(1, 9, seed=1))
    cache.truncate(N)
    logits(model, cache, token_ids(1, 30, seed=2))
    cache.truncate(N)
    assert cache.get_seq_length() == N
    assert torch.equal(logits(model, cache, token_ids(1, 9, seed=1)), first)


def test_crop_takes_what_old_and_new_transformers_pass() -> None:
    """Negative drops that many tokens; positive keeps that many; both only from the tail."""
    model = tiny_model()
    cache = compressed(model)
    logits(model, cache, token_ids(1, 9))
    cache.crop(-4)
    assert cache.get_seq_length() == N + 5
    cache.crop(N + 2)
    assert cache.get_seq_length() == N + 2
    with pytest.raises(InvalidArgumentError, match=f"at least the {N} tokens"):
        cache.crop(N - 1)
    with pytest.raises(InvalidArgumentError, match="at most"):
        cache.truncate(N + 3)
    assert cache.get_seq_length() == N + 2


def test_batch_operations_share_the_context() -> None:
    """Repeating and reordering rows copies no packed pair, and rows go on as their source did."""
    model = tiny_model()
    cache = compressed(model, batch=2)
    question = token_ids(2, 4, seed=1)
    expected = logits(model, cache.fork(), question)
    resident = cache.resident_bytes
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    assert cache.resident_bytes == resident
    rows = torch.tensor([1, 0, 0, 1])
    torch.testing.assert_close(logits(model, cache, question[rows]), expected[rows])
    before = cache.layers[0].packed.columns["keys"].shape[0]
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.layers[0].packed.num_rows == 1 and cache.layers[0].packed.columns["keys"].shape[0] < before
    cache.truncate(N)
    torch.testing.assert_close(logits(model, cache, question[1:]), expected[1:])


def test_reset_empties_the_cache_for_a_new_context() -> None:
    """After reset the same cache takes another context, of another batch size, and can be compressed again."""
    model = tiny_model()
    cache = compressed(model, batch=2)
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad(), RandomPress(0.6)(model):
        model(token_ids(1, N), past_key_values=cache)
    fresh = compressed(model)
    question = token_ids(1, 4, seed=1)
    torch.testing.assert_close(logits(model, cache, question), logits(model, fresh, question), atol=1e-4, rtol=1e-4)


def test_kept_positions_and_seqlens_agree() -> None:
    """Lengths are those of the positions, which ascend."""
    cache = compressed(tiny_model(), batch=2)
    for row, heads in enumerate(cache.kept_positions(1)):
        for head, positions in enumerate(heads):
            assert len(positions) == cache.seqlens(1)[row, head]
            assert positions.tolist() == sorted(set(positions.tolist()))
    with pytest.raises(InvalidArgumentError, match="compressed layers"):
        compressed(tiny_model("gemma3_text")).seqlens(0)


def test_both_fractions_of_a_hybrid_model() -> None:
    """On a hybrid model the kept fraction is that of compressible pairs; bytes tell the whole."""
    cache = compressed(tiny_model("gemma3_text"), ratio=0.5)
    assert cache.kept_fraction == pytest.approx(0.5, abs=0.05)
    assert cache.resident_bytes / cache.dense_bytes > cache.kept_fraction
    assert not any(hasattr(cache.layers[i], "packed") for i in (0, 2))


def test_a_model_that_is_not_attached_refuses_a_ragged_cache() -> None:
    """An attention function that does not know the cache raises instead of answering wrongly."""
    for implementation in ("sdpa", "eager"):
        model = tiny_model(attn_implementation=implementation)
        cache = compressed(model)
        detach(model)
        with pytest.raises(CacheMismatchError, match="attach"):
            logits(model, cache, token_ids(1, 3))
        cache.truncate(N)
        attach(model)
        assert logits(model, cache, token_ids(1, 3)).isfinite().all()


def test_another_model_is_refused() -> None:
    """Weights that did not make the cache are told from those that did, even with an equal config."""
    model = tiny_model()
    cache = compressed(model)
    twin, other = tiny_model(), tiny_model(seed=1)
    question = token_ids(1, 3)
    for attached in (twin, other):
        attach(attached)
    expected = logits(model, cache.fork(), question)
    assert torch.equal(logits(twin, cache.fork(), question), expected)
    with pytest.raises(CacheMismatchError, match="another model"):
        logits(other, cache.fork(), question)


def test_dense_keys_of_a_ragged_layer_cannot_be_read() -> None:
    """Code that expects dense tensors gets an error, not a part of the cache."""
    layer = compressed(tiny_model()).layers[0]
    with pytest.raises(CacheMismatchError, match="no dense"):
        _ = layer.keys
    with pytest.raises(CacheMismatchError, match="no dense"):
        _ = layer.values


def test_a_batch_of_another_size_is_refused() -> None:
    """Keys of another batch size raise and leave the cache as it was."""
    model = tiny_model()
    cache = compressed(model)
    with pytest.raises(CacheMismatchError, match="expected keys"):
        logits(model, cache, token_ids(2, 3))
    assert cache.get_seq_length() == N


def test_truncate_of_a_hybrid_cache_refuses_what_its_sliding_layers_lost() -> None:
    """Past its window a sliding layer cannot go back: an error that names fork, and nothing is changed."""
    model = tiny_model("gemma3_text")
    cache = compressed(model)
    logits(model, cache, token_ids(1, 4))
    with pytest.raises(InvalidArgumentError, match="fork"):
        cache.truncate(N)
    assert {layer.get_seq_length() for layer in cache.layers} == {N + 4}


def test_of_refuses_a_cache_without_ragged_layers() -> None:
    """A dense cache is not a compressed one."""
    with pytest.raises(CacheMismatchError, match="ragged"):
        RaggedCache.of(DynamicCache())
