"""AIME 2024 and MATH-500: problems that are worked out, for presses that evict while decoding."""
