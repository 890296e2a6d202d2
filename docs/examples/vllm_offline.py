"""Asks vLLM about compressed contexts, without a server: ``python vllm_offline.py MODEL CONTEXTS``.

MODEL is what compressed the contexts (a folder or a hub id), CONTEXTS a folder that ``kvzip-press compress`` filled.
All contexts are asked the same question at once; the last request is about none.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from vllm import LLM

from kvzip_press import load_model, question_ids
from kvzip_press.serving.folder import ContextFolder
from kvzip_press.serving.vllm.facts import ServedModel
from kvzip_press.serving.vllm.plugin import engine_options
from kvzip_press.serving.vllm.requests import context_params

QUESTION = "What is this about?"


def main(model_name: str, contexts: str) -> None:
    """Starts an engine, asks, and prints the answers."""
    model, tokenizer = load_model(model_name)  # once, to see how it turns keys and which weights it has
    served = ServedModel.of(model, contexts, pool_bytes=2_000_000_000)
    path, dtype = model.name_or_path, str(model.dtype).removeprefix("torch.")
    names = [*ContextFolder(contexts, served.check).names, None]
    del model
    with TemporaryDirectory() as place:
        facts = Path(place, "served.json")
        served.write(facts)
        engine = LLM(path, dtype=dtype, max_model_len=512, **engine_options(str(facts)))
        prompt = {"prompt_token_ids": list(question_ids(tokenizer, QUESTION))}
        params = [context_params(name, temperature=0, max_tokens=32) for name in names]
        answers = engine.generate([prompt] * len(names), params, use_tqdm=False)
        for name, answer in zip(names, answers, strict=True):
            print(f"{name or 'no context'}: {answer.outputs[0].text.strip()}")  # noqa: T201  # an example


if __name__ == "__main__":
    main(*sys.argv[1:])
