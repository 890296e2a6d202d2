"""AIME 2024 and MATH-500: problems with long worked answers, for presses that evict while decoding."""
