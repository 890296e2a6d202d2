"""``kvzip-press profile``: what compression gains on a model, from prefill to decode, and where the gain begins."""
