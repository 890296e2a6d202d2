"""Compressed contexts in vLLM, through its public seams: only questions and answers lie in its pages."""
