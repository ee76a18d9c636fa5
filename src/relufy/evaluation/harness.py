"""Tasks of lm-evaluation-harness, from folders of one's own or by name, run on one model."""

import logging
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relufy.errors import UserError
from relufy.evaluation.chance import Chance, chance_of
from relufy.evaluation.scores import Kind, Scores, pooled
from relufy.schema import suggest

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

SEED = 1234
"""Of the examples in few-shot prompts, and numpy's, as lm-evaluation-harness has it."""
ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")


def task_manager(tasks: Sequence[str], folders: Sequence[str | Path]) -> "TaskManager":
    """Return the harness's index of tasks: of the folders alone if they have all, else of its own ones too.

    Raises UserError for a folder that is not there and for a task that nobody knows.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"there is no task folder {folder}")
    with _quiet():
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=list(map(Path, folders)), include_defaults=False)
        if not _unknown(manager, tasks):
            return manager
        manager = TaskManager(include_path=list(map(Path, folders)))
    if unknown := _unknown(manager, tasks):
        raise UserError(
            f"there is no task {unknown[0]!r}{suggest(unknown[0], manager.all_tasks)}; name one of "
            "lm-evaluation-harness, or give the folder that has it (--task-folder)"
        )
    return manager


def _unknown(manager: "TaskManager", tasks: Sequence[str]) -> list[str]:
    return [name for name in tasks if name not in manager.all_tasks and not Path(name).is_file()]


def run_tasks(
    lm: "LM",
    manager: "TaskManager",
    tasks: Sequence[str],
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> tuple[list[Scores], dict[str, tuple[str, ...]], list[str]]:
    """Run tasks on a model; return scores by task and metric, the tasks of each group, and what to know.

    `limit` keeps the first documents of each task. Sets the seeds of `random` and numpy, so that two models
    see the same prompts. Raises UserError where a task or its data can't be loaded.
    """
    random.seed(0)
    np.random.seed(SEED)
    with _quiet():
        loaded = _loaded(manager, tasks)
        notes = [note for task in loaded["tasks"].values() if (note := _set_fewshot(task, num_fewshot))]
        results = _evaluated(lm, loaded, limit)
    groups = {
        name: tuple(task.task_name for task in loaded["groups"][name].get_all_tasks())
        for name in tasks
        if name in loaded["groups"]
    }
    found = {
        name: list(_scores(name, task, results["samples"][name])) for name, task in loaded["tasks"].items()
    }
    pools = [
        scores for name, tasks in groups.items() for scores in pooled(name, [found[task] for task in tasks])
    ]
    return [*pools, *(scores for task in found.values() for scores in task)], groups, notes


def _loaded(manager: "TaskManager", tasks: Sequence[str]) -> Any:
    try:
        return manager.load(list(tasks))
    except Exception as error:  # whatever data sets, hubs and task files raise
        raise UserError(
            f"{' '.join(tasks)}: could not be loaded ({type(error).__name__}: {_one_line(error)}); for work "
            "offline, load the data once while online, or give --task-folder with tasks on local files"
        ) from error


def _evaluated(lm: "LM", loaded: Any, limit: int | None) -> Any:
    from lm_eval.evaluator import evaluate

    try:
        return evaluate(lm, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    except UserError:
        raise
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"{' '.join(loaded['tasks'])}: {type(error).__name__}: {_one_line(error)}") from error


def _set_fewshot(task: Any, num_fewshot: int | None) -> str:
    """Set a task's examples, as the harness does; return what it could not do."""
    own = task.get_config("num_fewshot")
    note = ""
    if num_fewshot is not None and own == 0 and num_fewshot != 0:
        note = f"{task.task_name} is defined with no examples in its prompt, and keeps none"
    elif num_fewshot is not None or own is None:
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=SEED)
    return note


def _scores(name: str, task: Any, samples: Sequence[Mapping[str, Any]]) -> Iterator[Scores]:
    chance = _chance(task, samples)
    for filter_name in dict.fromkeys(sample["filter"] for sample in samples):
        rows = [sample for sample in samples if sample["filter"] == filter_name]
        for metric in dict.fromkeys(name for row in rows for name in row["metrics"]):
            having = [row for row in rows if metric in row["metrics"]]
            aggregate, higher = task.aggregation().get(metric), task.higher_is_better().get(metric)
            yield Scores(
                name=name,
                metric=metric if filter_name == "none" else f"{metric},{filter_name}",
                kind=_kind(aggregate, [row[metric] for row in having]),
                items=tuple(row[metric] for row in having),
                documents=tuple(f"{row['doc_hash']}{row['prompt_hash']}" for row in having),
                aggregate=aggregate or _mean,
                higher_is_better=True if higher is None else bool(higher),
                chance=chance if metric in ACCURACIES and len(having) == len(rows) else None,
                filter=filter_name,
            )


def _mean(items: list[Any]) -> float:
    return sum(items) / len(items)


def _kind(aggregate: Callable[[list[Any]], float] | None, items: Sequence[Any]) -> Kind:
    from lm_eval.api import metrics

    known: dict[Any, Kind] = {
        None: "mean",
        metrics.mean: "mean",
        metrics.perplexity: "perplexity",
        metrics.weighted_perplexity: "weighted_perplexity",
        metrics.bits_per_byte: "bits_per_unit",
    }
    kind = known.get(aggregate, "other")
    are_numbers = all(isinstance(item, (bool, int, float, np.number)) for item in items)
    return "other" if kind in ("mean", "perplexity") and not are_numbers else kind


def _chance(task: Any, samples: Sequence[Mapping[str, Any]]) -> Chance | None:
    """Return the chance of a multiple choice, from the requests of its documents; None for other tasks."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    rows = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    asks_twice = "acc_mutual_info" in rows[0]["metrics"]
    choices = [row["arguments"][: len(row["arguments"]) // (1 + asks_twice)] for row in rows]
    texts = [tuple(ask[1] for ask in asked) for asked in choices]
    right = [_right_ones(row["target"], asked) for row, asked in zip(rows, texts, strict=True)]
    is_fixed = len(set(texts)) == 1 and len(set(texts[0])) == len(texts[0])
    answers = [next(iter(ones), None) if is_fixed and len(ones) == 1 else None for ones in right]
    return chance_of([len(asked) for asked in choices], [max(1, len(ones)) for ones in right], answers)


def _right_ones(target: Any, texts: Sequence[str]) -> list[Any]:
    """Return the right choices, as the task's target names them: by index or text, one or several."""
    targets = target if isinstance(target, (list, tuple)) else [target]
    return list(dict.fromkeys(targets))[: len(texts)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's own words off stdout and, but for errors, off stderr."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
