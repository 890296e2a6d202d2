"""Kernels for KV caches with uneven heads: tensors in, tensors out; installed as ``kvzip_press.kernels``."""

from typing import NoReturn

if not __name__.startswith("kvzip_press."):
    # Not raised at once, as by the other folders: transformers looks for a package of this name, and where Python is
    # started in a checkout it imports this one to see its version.
    __path__ = []

    def __getattr__(name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError("import kvzip_press.kernels; the bare name 'kernels' would load a second copy of every class")
