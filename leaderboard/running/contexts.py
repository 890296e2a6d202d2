"""Turns samples into contexts: the tokens that a model reads at once, and the questions that follow."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvzip_press.decoding.answering import question_ids
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.running.plan import Run, Work
from kvzip_press.leaderboard.samples.task import Question
from kvzip_press.model.chat import chat_frame, encode


@dataclass(frozen=True)
class Context:
    """Token ids that are read and compressed together, and the questions that follow them.

    Attributes:
        work: The sample and its task.
        ids: The context's tokens, without the chat template's; in a query-aware run they end with the question. Empty
            for a sample without a context, of which only the question is read.
        questions: The questions to ask.
        texts: What is left to ask of each question: its text, or nothing if ``ids`` already end with it.
        tags: Tags for the context's rows, in addition to the questions' own.
    """

    work: Work
    ids: tuple[int, ...]
    questions: tuple[Question, ...]
    texts: tuple[str, ...]
    tags: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name that errors use."""
        return f"{self.work.task.name}/{self.work.sample.sample_id}"


def contexts_of(work: Work, run: Run, tokenizer: Any, limit: int | None) -> list[Context]:
    """Returns the contexts of a sample: a single one, or one per question in a query-aware run.

    Args:
        work: The sample.
        run: Decides whether contexts include the question, and whether a context that is too long is cut.
        tokenizer: The model's tokenizer.
        limit: The number of the model's positions; None if it has no limit.

    Raises:
        InvalidArgumentError: Context, question and answer exceed the positions, and the run does not truncate; question
            and answer exceed them even without a context; or the sample is a conversation in a query-aware run.
    """
    sample = work.sample
    ids = encode(tokenizer, sample.context)
    if not run.query_aware or not ids:
        texts = tuple(question.text for question in sample.questions)
        return [_fitted(Context(work, ids, sample.questions, texts), run, tokenizer, limit)]
    if sample.multi_turn:
        raise InvalidArgumentError(
            f"expected single questions in a query-aware run, got a conversation, {work.task.name}/{sample.sample_id}"
        )
    return [
        _with_question(_fitted(Context(work, ids, (question,), (question.text,)), run, tokenizer, limit), tokenizer)
        for question in sample.questions
    ]


def batches(contexts: Iterable[Context], batch_size: int) -> Iterator[list[Context]]:
    """Groups contexts of one task, ``batch_size`` at a time and the rest at the end; those without tokens go alone."""
    waiting: dict[str, list[Context]] = {}
    for context in contexts:
        group = waiting.setdefault(context.work.task.name, []) if context.ids else []
        group.append(context)
        if len(group) == batch_size or not context.ids:
            yield waiting.pop(context.work.task.name) if context.ids else group
    yield from waiting.values()


def prompt_ids(tokenizer: Any, question: Question) -> list[int]:
    """Returns the whole prompt of a question that has no context."""
    frame = chat_frame(tokenizer)
    text = encode(tokenizer, question.text.strip())
    return [*frame.prefix, *text, *frame.suffix, *encode(tokenizer, question.answer_prefix)]


def _fitted(context: Context, run: Run, tokenizer: Any, limit: int | None) -> Context:
    """Returns the context, with its middle cut out if it is too long and the run truncates."""
    if limit is None:
        return context
    room = limit - len(chat_frame(tokenizer).prefix) - _tokens_after(context, tokenizer)
    if room < bool(context.ids):
        raise InvalidArgumentError(
            f"{context.name}: expected a question and its answer within the model's {limit} positions, "
            f"got {limit - room}"
        )
    excess = len(context.ids) - room
    if excess <= 0:
        return context
    if not run.truncate:
        raise InvalidArgumentError(
            f"{context.name}: expected context, question and answer within the model's {limit} positions, got "
            f"{limit + excess}; a run with `truncate: true` cuts such contexts in their middle"
        )
    half = room // 2
    ids = context.ids[: room - half] + context.ids[len(context.ids) - half :]
    return Context(context.work, ids, context.questions, context.texts, {"truncated_tokens": float(excess)})


def _tokens_after(context: Context, tokenizer: Any) -> int:
    """Counts the tokens that may follow a context: those of one turn, or of all turns of a conversation."""
    conversation = context.work.sample.multi_turn
    asked = [
        len(question_ids(tokenizer, text, question.answer_prefix, is_first=not (conversation and number)))
        for number, (text, question) in enumerate(zip(context.texts, context.questions, strict=True))
    ]
    bounds = [question.max_new_tokens for question in context.questions]
    return sum(asked) + sum(bounds) if conversation else max(asked) + max(bounds)


def _with_question(context: Context, tokenizer: Any) -> Context:
    """Moves the question into the context, as its end; only the end of the user's turn is left of the prompt."""
    question = encode(tokenizer, f"\n\n{context.texts[0].strip()}")
    return Context(context.work, context.ids + question, context.questions, ("",), context.tags)
