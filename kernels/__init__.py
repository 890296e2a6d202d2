"""Kernels for KV caches with uneven heads: tensors in, tensors out; installed as ``kvzip_press.kernels``."""

if not __name__.startswith("kvzip_press."):
    raise ImportError("import kvzip_press.kernels; the bare name 'kernels' would load a second copy of every class")
