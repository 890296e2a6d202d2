"""Near-duplicates: for each key the newest other one that a plain loop in fp64 finds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvzip_press.kernels.near_duplicates import near_duplicates, reference

View = Callable[[Tensor], Tensor]

IMPLS = [None, "reference", pytest.param("triton", marks=pytest.mark.triton)]
BLOCK_I, BLOCK_J = 128, 64  # keys of a program in half precision, and of a tile


def repeated(
    n: int,
    head_dim: int = 16,
    *,
    batch_size: int = 1,
    heads: int = 2,
    different: int = 5,
    noise: float = 0.05,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Keys of ``different`` unlike directions and all lengths, in an order of chance; most of them valid."""
    shape = (batch_size, heads, n)
    directions = torch.linalg.qr(torch.randn(batch_size, heads, head_dim, head_dim))[0][:, :, :different]
    which = torch.randint(different, shape)
    keys = directions.gather(2, which.unsqueeze(-1).expand(*shape, head_dim)) + noise * torch.randn(*shape, head_dim)
    return (keys * torch.exp(2 * torch.randn(*shape, 1))).to(dtype), torch.rand(shape) < 0.8


def one_by_one(keys: Tensor, valid: Tensor, threshold: float) -> list[int]:
    """The newest key like each, pair by pair in fp64, for all heads one after another."""
    found = []
    for own, are_keys in zip(keys.double().flatten(0, 1).tolist(), valid.flatten(0, 1).tolist(), strict=True):
        norms = [max(sum(x * x for x in key) ** 0.5, 1e-12) for key in own]
        for i, key in enumerate(own):
            others = [
                j
                for j, other in enumerate(own)
                if are_keys[i] and are_keys[j] and i != j
                if sum(x * y for x, y in zip(key, other, strict=True)) / norms[i] / norms[j] > threshold
            ]
            found.append(max(others, default=-1))
    return found


def check(keys: Tensor, valid: Tensor, threshold: float, impl: str | None, device: torch.device) -> Tensor:
    """Asserts that what is found is what the loop finds."""
    newest = near_duplicates(keys.to(device), valid.to(device), threshold, impl=impl)
    assert (newest.shape, newest.dtype, newest.is_contiguous()) == (keys.shape[:3], torch.int64, True)
    assert newest.flatten().tolist() == one_by_one(keys, valid, threshold)
    return newest


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n", [0, 1, 2, BLOCK_J - 1, BLOCK_J, BLOCK_J + 1, BLOCK_I - 1, BLOCK_I, BLOCK_I + 1, 200])
def test_it_finds_what_a_loop_finds_at_every_length(n: int, impl: str | None, device: torch.device) -> None:
    newest = check(*repeated(n), 0.5, impl, device)
    assert n < BLOCK_J or 0.5 < (newest >= 0).double().mean() < 1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 80, 96, 256])
def test_it_does_in_every_width_and_dtype(
    head_dim: int, dtype: torch.dtype, impl: str | None, device: torch.device
) -> None:
    check(*repeated(70, head_dim, batch_size=2, dtype=dtype), 0.5, impl, device)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", [-1.5, -0.5, 0.2, 0.999, 1.5])
def test_it_does_at_every_threshold(
    threshold: float, dtype: torch.dtype, impl: str | None, device: torch.device
) -> None:
    """All others are like a key, all but its opposite, copies, copies to the bit but for lengths; none."""
    keys, valid = repeated(80, noise=0.01, dtype=dtype)
    keys[:, :, ::7] *= -1
    check(keys, valid, threshold, impl, device)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("different", [1, 16])
def test_programs_that_are_done_early_or_never_find_the_same(
    different: int, impl: str | None, device: torch.device
) -> None:
    """Ten tiles of a program, twice as many as it reads before it looks whether each of its keys has found one."""
    n = 10 * BLOCK_J + 3
    keys = torch.eye(16)[torch.arange(n) % different].expand(1, 1, -1, -1)
    if different > 1:  # all but one kind are there once
        keys = torch.where(torch.arange(n)[:, None] < different, keys, torch.zeros(16))
        keys = torch.cat([keys, torch.eye(16)[:1].expand(1, 1, -1, -1)], 2)
    newest = near_duplicates(
        keys.to(device), torch.ones(keys.shape[:3], dtype=torch.bool, device=device), 0.5, impl=impl
    )
    if different == 1:
        assert newest.flatten().tolist() == [n - 1] * (n - 1) + [n - 2]
    else:
        assert newest.flatten().tolist() == [n] + [-1] * (n - 1) + [0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_a_key_does_not_matter(poison: float, impl: str | None, device: torch.device) -> None:
    """Nor does what lies around a view; and heads may have no key at all, or one."""
    keys, valid = repeated(150, heads=4, dtype=torch.bfloat16)
    valid[:, 1] = False
    valid[:, 2] = torch.arange(150) == 77
    newest = check(keys, valid, -2.0, impl, device)
    assert (newest[:, 1:3] == -1).all()
    expected = near_duplicates(keys, valid, 0.5, impl="reference")
    keys[~valid] = poison
    assert torch.equal(near_duplicates(keys.to(device), valid.to(device), 0.5, impl=impl).cpu(), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_zeros_are_like_no_key_and_neither_is_a_key_with_a_nan(impl: str | None, device: torch.device) -> None:
    keys, _ = repeated(40, different=1)
    valid = torch.ones(1, 2, 40, dtype=torch.bool)
    keys[:, :, 30:] = 0
    keys[:, :, 5] *= 1e-15  # its norm is below the least: its cosines are nearly 0
    newest = check(keys, valid, 0.0, impl, device)
    assert (newest[..., 30:] == -1).all() and (newest[..., :29] == 29).all()
    expected = [28 if i == 29 else 29 for i in range(28)] + [-1, 27]
    keys[:, :, 28, 3] = torch.nan
    newest = near_duplicates(keys.to(device), valid.to(device), 0.5, impl=impl)
    expected[5] = -1
    assert newest[0, 0].tolist() == newest[0, 1].tolist() == expected + [-1] * 10


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides_are_followed(dtype: torch.dtype, impl: str | None, device: torch.device, inside_nan: View) -> None:
    keys, valid = repeated(90, 24, batch_size=2, heads=3, dtype=dtype)
    expected = one_by_one(keys, valid, 0.5)
    for view in (
        inside_nan(keys.to(device)),
        keys.to(device).transpose(1, 2).contiguous().transpose(1, 2),
        keys.to(device).repeat_interleave(2, 2)[:, :, ::2],
    ):
        turned = valid.to(device).mT.contiguous().mT
        assert near_duplicates(view, turned, 0.5, impl=impl).flatten().tolist() == expected


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_half_precision_are_not_rounded(dtype: torch.dtype, impl: str | None, device: torch.device) -> None:
    """Cosines of 1 - 2^-13 and of 1, which differ by less than what the dtype has near 1."""
    keys = torch.zeros(1, 1, 3, 128, dtype=dtype)
    keys[..., 0], keys[:, :, 1, 1] = 1.0, 2**-6
    valid = torch.ones(1, 1, 3, dtype=torch.bool)
    for threshold, expected in ((1 - 2**-12, [2, 2, 1]), (1 - 2**-14, [2, -1, 0])):
        newest = near_duplicates(keys.to(device), valid.to(device), threshold, impl=impl)
        assert newest.flatten().tolist() == expected


@pytest.mark.parametrize("tile", [1, 50, 1000, 3000])
def test_the_reference_finds_the_same_in_tiles_of_any_size(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one row, of some rows of a head, of one head and of several."""
    keys, valid = repeated(30, batch_size=2, heads=3)
    expected = one_by_one(keys, valid, 0.5)
    monkeypatch.setattr(reference, "TILE", tile)
    assert near_duplicates(keys, valid, 0.5, impl="reference").flatten().tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_does_fp64_and_keys_that_are_differentiated(dtype: torch.dtype) -> None:
    keys, valid = repeated(30, dtype=dtype)
    expected = one_by_one(keys, valid, 0.5)
    newest = near_duplicates(keys.requires_grad_(), valid, 0.5, impl="reference")
    assert newest.flatten().tolist() == expected


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 0, 5, 16), (2, 2, 0, 16)])
def test_nothing_has_no_duplicates(shape: tuple[int, ...], impl: str | None, device: torch.device) -> None:
    keys = torch.zeros(shape, device=device)
    assert (
        near_duplicates(keys, torch.ones(shape[:3], dtype=torch.bool, device=device), 0.5, impl=impl).shape == shape[:3]
    )


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("shape", [(40, 8, 1152, 128), (1, 8, 4224, 128), (3, 2, 2049, 64)])
def test_it_finds_what_the_reference_finds_at_full_size(shape: tuple[int, ...], triton_device: torch.device) -> None:
    n, head_dim = shape[2:]
    keys, valid = repeated(
        n, head_dim, batch_size=shape[0], heads=shape[1], different=head_dim // 2, noise=0.2 * head_dim**-0.5,
        dtype=torch.bfloat16,
    )  # fmt: skip
    keys, valid = keys.to(triton_device), valid.to(triton_device)
    expected = near_duplicates(keys, valid, 0.5, impl="reference")
    assert 0.5 < (expected >= 0).double().mean() < 0.99
    assert torch.equal(near_duplicates(keys, valid, 0.5, impl="triton"), expected)


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_strides_beyond_32_bits_are_followed(dim: int, triton_device: torch.device) -> None:
    keys, valid = (tensor.to(triton_device) for tensor in repeated(70, batch_size=2, dtype=torch.bfloat16))
    stride = list(keys.contiguous().stride())
    stride[dim] = 2**31 // (keys.shape[dim] - 1) + 64
    span = sum((size - 1) * step for size, step in zip(keys.shape, stride, strict=True)) + 1
    far = torch.empty(span, dtype=keys.dtype, device=triton_device).as_strided(keys.shape, stride).copy_(keys)
    assert torch.equal(near_duplicates(far, valid, 0.5, impl="triton"), near_duplicates(keys, valid, 0.5))


@pytest.mark.triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "the dtype is torch.float64"),
        ({"head_dim": 257}, "head_dim is 257"),
        ({"turned": True}, "side by side"),
    ],
)
def test_the_kernel_refuses_what_it_cannot_do(
    change: dict[str, Any], message: str, triton_device: torch.device
) -> None:
    keys, valid = repeated(5, change.get("head_dim", 16), dtype=change.get("dtype", torch.float32))
    keys, valid = keys.to(triton_device), valid.to(triton_device)
    if change.get("turned"):
        keys = keys.mT.contiguous().mT
    with pytest.raises(ValueError, match=message):
        near_duplicates(keys, valid, 0.5, impl="triton")
    assert torch.equal(near_duplicates(keys, valid, 0.5), near_duplicates(keys, valid, 0.5, impl="reference"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": torch.zeros(2, 5, 16)}, ValueError, "keys: expected"),
        ({"keys": torch.zeros(1, 2, 5, 16).int()}, TypeError, "keys: expected a floating-point dtype"),
        ({"keys": [0.0]}, TypeError, "keys: expected a tensor"),
        ({"valid": torch.ones(1, 2, 4).bool()}, ValueError, "valid: expected"),
        ({"valid": torch.ones(1, 2, 5)}, TypeError, "valid: expected torch.bool"),
        ({"valid": torch.ones(1, 2, 5, device="meta").bool()}, ValueError, "valid: expected device"),
        ({"impl": "cuda"}, ValueError, "near_duplicates: expected impl to be None or one of"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"keys": torch.zeros(1, 2, 5, 16), "valid": torch.ones(1, 2, 5).bool(), "threshold": 0.5}
    with pytest.raises(error, match=message):
        near_duplicates(**(arguments | change))
