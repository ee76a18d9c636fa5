"""`relufy.evaluate`: one model's quality, or two models' side by side, on text and on tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from relufy.activation_sparsity import read_activation_sparsity
from relufy.errors import UserError
from relufy.evaluation.backends import Backend, open_backend
from relufy.evaluation.options import EvalOptions
from relufy.evaluation.result import Evaluation, TextFacts
from relufy.evaluation.rows import make_rows
from relufy.evaluation.scores import Scores
from relufy.evaluation.text import Window, text_scores, text_windows
from relufy.text import refuse_long_windows
from relufy.text_sample import text_pieces

CHUNK = 64
"""Windows of a text that are held at once."""


@dataclass(frozen=True)
class _Found:
    """What one model scored."""

    facts: dict[str, Any]
    text: TextFacts | None
    text_scores: list[Scores]
    task_scores: list[Scores]
    groups: Mapping[str, Sequence[str]]
    notes: tuple[str, ...]


def evaluate(
    model: str | Path,
    before: str | Path | None = None,
    text: Sequence[str | Path] | str | Path = (),
    tasks: Sequence[str] | str = (),
    options: EvalOptions | None = None,
) -> Evaluation:
    """Evaluate a checkpoint (or a packed file, by the engine) on text files and on tasks. Raises UserError.

    `before` is another one, as a rule the dense model, that it is compared with in pairs: the same windows,
    the same documents with the same prompts. `tasks` are names of lm-evaluation-harness (tasks, groups,
    tags), or of `options.task_folders`. The two models are loaded one after the other.
    """
    options = options or EvalOptions()
    files = [text] if isinstance(text, str | Path) else list(text)
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not files and not names:
        raise UserError("there is nothing to evaluate on: give text, or tasks")
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"there is no text file {file}")
    manager = _manager(names, options)
    earlier = None if before is None else _found(before, files, names, manager, options)
    found = _found(model, files, names, manager, options)
    compared = earlier or found
    return Evaluation(
        model=str(model),
        before=None if before is None else str(before),
        facts=found.facts,
        before_facts=earlier and earlier.facts,
        options=_plain(options) | {"tasks": names},
        text=found.text,
        text_rows=tuple(make_rows(earlier and earlier.text_scores, found.text_scores, options.level)),
        task_rows=tuple(
            make_rows(earlier and earlier.task_scores, found.task_scores, options.level, found.groups)
        ),
        notes=tuple(dict.fromkeys((*compared.notes, *found.notes))),
    )


def _manager(names: Sequence[str], options: EvalOptions) -> Any:
    """Return the index of tasks, before any model is loaded."""
    if not names:
        return None
    from relufy.evaluation.harness import task_manager

    return task_manager(names, options.task_folders)


def _plain(options: EvalOptions) -> dict[str, Any]:
    return asdict(options) | {"task_folders": [str(folder) for folder in options.task_folders]}


def _found(
    model: str | Path, files: Sequence[str | Path], names: Sequence[str], manager: Any, options: EvalOptions
) -> _Found:
    backend = open_backend(model, options)
    text, on_text = (None, []) if not files else _on_text(backend, files, options)
    on_tasks, groups, notes = ([], {}, []) if not names else _on_tasks(backend, names, manager, options)
    notes = [f"{model}: {note}" for note in (*_phase_notes(backend.config), *notes)]
    return _Found(backend.facts(), text, on_text, on_tasks, groups, tuple(notes))


def _phase_notes(config: Mapping[str, Any]) -> list[str]:
    """Return what log-likelihoods can't see of a model: masks that leave prompts dense."""
    sparsifiers = read_activation_sparsity(config).sparsifiers
    sites = [site for sparsifier in sparsifiers if sparsifier.phase == "decode" for site in sparsifier.sites]
    if not sites:
        return []
    return [
        f"the masks at {' '.join(sites)} leave prompts dense, so that texts and choices are scored without "
        "them: only generated text shows what they cost"
    ]


def _on_text(
    backend: Backend, files: Sequence[str | Path], options: EvalOptions
) -> tuple[TextFacts, list[Scores]]:
    refuse_long_windows(options.window, backend.longest)
    from tqdm import tqdm

    stream = islice(
        text_windows(text_pieces(files), backend.encode, options.window, backend.bos), options.max_windows
    )
    windows: list[Window] = []
    logprobs: list[float] = []
    with tqdm(desc="text", unit=" windows", disable=None) as bar:
        while part := list(islice(stream, CHUNK)):
            logprobs += backend.logprobs([window.tokens for window in part])
            windows += [window.without_tokens() for window in part]
            bar.update(len(part))
    facts = TextFacts(
        files=tuple(map(str, files)),
        tokens=sum(window.num_predicted for window in windows),
        bytes=sum(window.bytes for window in windows),
        words=sum(window.words for window in windows),
        windows=len(windows),
        window=options.window,
    )
    return facts, text_scores(windows, logprobs)


def _on_tasks(
    backend: Backend, names: Sequence[str], manager: Any, options: EvalOptions
) -> tuple[list[Scores], Mapping[str, Sequence[str]], list[str]]:
    from relufy.evaluation.harness import run_tasks

    lm: Any = backend.harnessed()
    scores, groups, notes = run_tasks(lm, manager, names, options.limit, options.num_fewshot)
    if cut := lm.cuts.note():
        notes.append(cut)
    return scores, groups, notes
