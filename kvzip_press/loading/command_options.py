"""The options of a command that say which model runs where, and the model that they name."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvzip_press.errors import InvalidArgumentError

DTYPES = ("bf16", "fp16", "fp32")

ModelOption = Annotated[str, typer.Option("--model", help="Path or hub id of a model, or smollm2 (embedded).")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu or cuda; default the GPU if any.")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="bf16, fp16 or fp32; default bf16 on a GPU.")]


def load(name: str, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    """The model on its device, and its tokenizer.

    Args:
        name: As for :func:`kvzip_press.load_model`.
        device: "cpu", "cuda", "cuda:1"; None for the GPU if there is one.
        dtype: One of ``DTYPES``; None for bf16 on a GPU and for what the model was saved in elsewhere.

    Raises:
        InvalidArgumentError: Another dtype, or a device that is not there.
    """
    import torch

    from kvzip_press.loading.by_name import load_model

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidArgumentError(f"expected --device to be one that torch has here, got {device!r}") from error
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: "auto"}
    chosen = dtype or ("bf16" if device.startswith("cuda") else None)
    if chosen not in dtypes:
        raise InvalidArgumentError(f"expected --dtype to be one of {DTYPES}, got {dtype!r}")
    model, tokenizer = load_model(name, dtype=dtypes[chosen])
    model.to(device)  # type: ignore[arg-type]  # transformers types this for its own parallel models
    return model, tokenizer
