"""Command-line options that say which model runs where, and a function that loads the model they name."""

from __future__ import annotations

from typing import Annotated, Any

import typer

ModelOption = Annotated[str, typer.Option("--model", help="Path or hub id of a model, or smollm2 (embedded).")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu or cuda; default the GPU if any.")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="bf16, fp16 or fp32; default bf16 on a GPU.")]


def load(name: str, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    """Loads a model onto its device, and its tokenizer.

    Args:
        name: A name as for :func:`kvzip_press.load_model`.
        device: "cpu", "cuda", "cuda:1"; None for the GPU if there is one.
        dtype: "bf16", "fp16" or "fp32"; None for bf16 on a GPU, and elsewhere for the dtype that the model was saved
            in.

    Returns:
        ``(model, tokenizer)``.

    Raises:
        InvalidArgumentError: The dtype is another one, or the device does not exist.
    """
    from kvzip_press.loading.by_name import load_on
    from kvzip_press.model.devices import get_device, get_dtype

    place = get_device(device)
    chosen = get_dtype(dtype or ("bf16" if place.type == "cuda" else None))
    return load_on(name, place, chosen)
