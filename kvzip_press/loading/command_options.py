"""The options of a command that say which model runs where, and the model that they name."""

from __future__ import annotations

from typing import Annotated, Any

import typer

ModelOption = Annotated[str, typer.Option("--model", help="Path or hub id of a model, or smollm2 (embedded).")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu or cuda; default the GPU if any.")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="bf16, fp16 or fp32; default bf16 on a GPU.")]


def load(name: str, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    """The model on its device, and its tokenizer.

    Args:
        name: As for :func:`kvzip_press.load_model`.
        device: "cpu", "cuda", "cuda:1"; None for the GPU if there is one.
        dtype: "bf16", "fp16" or "fp32"; None for bf16 on a GPU and for what the model was saved in elsewhere.

    Raises:
        InvalidArgumentError: Another dtype, or a device that is not there.
    """
    from kvzip_press.loading.by_name import load_model
    from kvzip_press.model.devices import get_device, get_dtype

    place = get_device(device)
    chosen = get_dtype(dtype or ("bf16" if place.type == "cuda" else None))
    model, tokenizer = load_model(name, dtype=chosen or "auto")
    model.to(place)  # type: ignore[arg-type]  # transformers types this for its own parallel models
    return model, tokenizer
