"""LongBench as kvpress hosts it."""
