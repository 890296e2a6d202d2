"""HumanEval's functions, by what they do."""
