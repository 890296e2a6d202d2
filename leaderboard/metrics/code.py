"""RepoQA's metric (arXiv 2406.06025): whether the function in the answer is the one that was asked for."""

import functools
import importlib
import re
from collections.abc import Sequence
from typing import Any

from kvzip_press.errors import InvalidArgumentError, MissingDependencyError, install_command
from kvzip_press.leaderboard.metrics.references import compared_with_texts

THRESHOLD = 0.8
# Its parts give nothing back: a block that is never closed is searched to its end once, not once a blank line.
_BLOCK = re.compile(r"^```(?>(?:\w+)?\s*\n)(.*?)(?=^```)```", re.DOTALL | re.MULTILINE)

_FUNCTIONS = {
    "python": ("tree_sitter_python", "language", "(function_definition name: (_)) @function"),
    "java": ("tree_sitter_java", "language", "(method_declaration name: (_)) @function"),
    "typescript": ("tree_sitter_typescript", "language_typescript", "(function_declaration name: (_)) @function"),
    "rust": ("tree_sitter_rust", "language", "(function_item name: (_)) @function"),
    "cpp": (
        "tree_sitter_cpp",
        "language",
        "(function_definition declarator: (function_declarator declarator: (identifier))) @function",
    ),
    "go": ("tree_sitter_go", "language", "(function_declaration name: (_)) @function"),
}
"""Language -> package of its grammar, the package's function, and the query that finds functions (RepoQA's own)."""


@compared_with_texts
def repoqa(prediction: str, functions: Sequence[str], language: str) -> float:
    """Returns 1.0 if the written function is similar enough to ``functions[0]``, and no more similar to another.

    Similarity is BLEU over words with smoothing method 4; enough is 0.8, as in SCBench's and KVzip's numbers.

    Args:
        prediction: The answer; if it has blocks of code, the first function in the first block that has one counts.
        functions: The function that was asked for, then the others of the repository.
        language: The programming language.

    Raises:
        InvalidArgumentError: A language that RepoQA does not have.
        MissingDependencyError: ``nltk`` or the grammar is not installed.
    """
    written = written_function(prediction, language)
    likeness = [_bleu(written, function) for function in functions]
    return float(bool(likeness) and likeness[0] >= THRESHOLD and likeness[0] == max(likeness))


def written_function(prediction: str, language: str) -> str:
    """Returns the first function in the answer's code blocks, else the first block, else the whole answer."""
    blocks = _BLOCK.findall(prediction.strip())
    functions = (_first_function(block, language) for block in blocks)
    return next((function for function in functions if function), blocks[0] if blocks else prediction.strip())


def _first_function(code: str, language: str) -> str | None:
    tree_sitter, grammar, query = _grammar(language)
    source = code.encode()
    root = tree_sitter.Parser(grammar).parse(source).root_node
    nodes = tree_sitter.QueryCursor(query).captures(root).get("function", [])
    first = min(nodes, key=lambda node: node.start_byte, default=None)
    return None if first is None else source[first.start_byte : first.end_byte].decode()


@functools.cache
def _grammar(language: str) -> tuple[Any, Any, str]:
    if language not in _FUNCTIONS:
        raise InvalidArgumentError(f"expected a language out of {', '.join(_FUNCTIONS)}, got {language!r}")
    package, function, query = _FUNCTIONS[language]
    try:
        tree_sitter, module = importlib.import_module("tree_sitter"), importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(f"RepoQA needs {package}: {install_command('tasks')}") from error
    grammar = tree_sitter.Language(getattr(module, function)())
    return tree_sitter, grammar, tree_sitter.Query(grammar, query)


def _bleu(written: str, function: str) -> float:
    try:
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    except ImportError as error:
        raise MissingDependencyError(f"RepoQA needs nltk: {install_command('tasks')}") from error
    words, expected = re.split(r"\s+", written.strip()), re.split(r"\s+", function.strip())
    return float(sentence_bleu([expected], words, smoothing_function=SmoothingFunction().method4))
