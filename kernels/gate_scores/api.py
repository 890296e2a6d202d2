"""Checks and dispatch of :func:`gate_scores`."""

from torch import Tensor

from kvzip_press.kernels.checks import check_device, check_floating, check_like, check_rank, check_shape
from kvzip_press.kernels.dispatch import Impl, deferred, select
from kvzip_press.kernels.gate_scores import reference
from kvzip_press.kernels.gate_scores.support import reason_against

_DIMS = "n_tokens, num_key_value_heads, num_key_value_groups, dim"

_IMPLS = {
    "triton": Impl(deferred("kvzip_press.kernels.gate_scores.triton", "gate_scores"), reason_against),
    "reference": Impl(reference.gate_scores),
}


def gate_scores(
    queries: Tensor,
    keys: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    bias: Tensor,
    sinks: Tensor,
    *,
    eps: float = 1e-6,
    impl: str | None = None,
) -> Tensor:
    """Returns a gate's scores of each token and KV head (Fast KVzip, arXiv 2601.17668), given its projections' outputs.

    For a token, KV head h and query head g of its group, all in fp32:

        q = RMSNorm(queries)[h, g]      k = RMSNorm(keys)[h]
        l = <q, k> / sqrt(dim) + bias[h, g]      s_j = <q, sinks[h, j]> / sqrt(dim)
        score[h] = mean over g of  e^l / (e^l + sum_j e^s_j)

    Args:
        queries: [n_tokens, num_key_value_heads, num_key_value_groups, dim], n_tokens >= 0, any floating dtype. This and
            ``keys`` may be views of one projection's output: they are read in place.
        keys: [n_tokens, num_key_value_heads, dim].
        q_weight: [dim], weight of the queries' norm; any floating dtype, as are the parameters below.
        k_weight: [dim], weight of the keys' norm.
        bias: [num_key_value_heads, num_key_value_groups].
        sinks: [num_key_value_heads, n_sink, dim].
        eps: epsilon of both norms.
        impl: "triton" (one launch; CUDA devices, or a CPU with ``TRITON_INTERPRET=1``; fp16, bf16 and fp32, last
            dimension of queries and keys contiguous, no gradient), "reference" (plain PyTorch, tokens in blocks so that
            logits stay small, differentiable) or None: the first that can do this input.

    Returns:
        Scores [num_key_value_heads, n_tokens] in (0, 1), fp32 (fp64 for fp64 queries), contiguous.

    Raises:
        ValueError: a shape, device or ``impl`` is not as above, or ``impl`` cannot do this input.
        TypeError: a dtype is not as above.
    """
    check_rank("queries", queries, _DIMS)
    check_floating("queries", queries)
    n_tokens, num_heads, groups, dim = queries.shape
    if min(num_heads, groups, dim) < 1:
        raise ValueError(f"queries: expected [{_DIMS}], all but the first at least 1, got shape {tuple(queries.shape)}")
    check_shape("keys", keys, (n_tokens, num_heads, dim), "n_tokens, num_key_value_heads, dim")
    check_like("keys", keys, "queries", queries)
    check_shape("q_weight", q_weight, (dim,), "dim")
    check_shape("k_weight", k_weight, (dim,), "dim")
    check_shape("bias", bias, (num_heads, groups), "num_key_value_heads, num_key_value_groups")
    check_rank("sinks", sinks, "num_key_value_heads, n_sink, dim")
    check_shape("sinks", sinks, (num_heads, sinks.shape[1], dim), "num_key_value_heads, n_sink, dim")
    parameters = {"q_weight": q_weight, "k_weight": k_weight, "bias": bias, "sinks": sinks}
    for name, parameter in parameters.items():
        check_floating(name, parameter)
        check_device(name, parameter, queries.device)
    run = select("gate_scores", _IMPLS, impl, queries, keys, *parameters.values())
    return run(queries, keys, *parameters.values(), eps=eps)
