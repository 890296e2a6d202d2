"""``kvzip-press profile``: measures what compression gains, from prefill to decode, and at which length it pays."""
