"""One training of a study: a specification in, a result out.

    python -m studies.job JOB.json WORK

`WORK` is a folder with the text (texts.py); the result goes to `WORK/results/NAME.json`, the model, if it is
kept, to `WORK/models/NAME`.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relufy.files import replacing
from relufy.measure.quality import perplexity
from relufy.model.checkpoint import load_model, save_checkpoint
from relufy.recipe import Finetune, recipe_from_mapping
from relufy.schema import from_mapping, to_mapping
from relufy.train.finetune import finetune
from relufy.train.new_model import new_model
from relufy.train.selftext import write_windows
from studies.evaluation import Evaluation, evaluate
from studies.texts import Texts

OWN_MODEL = "job:"
"""Before the name of a job in `start`: the model that it kept."""


@dataclass(frozen=True)
class Job:
    """What to train, and on what."""

    name: str
    start: str = "new"
    """"new", a checkpoint folder, or "job:NAME"."""
    shape: str = "3m"
    """Of a new model."""
    activation: str | None = None
    """Of a new model."""
    sparsify: dict[str, Any] = field(default_factory=dict)
    """A method and its parameters, as in a recipe: the zeros that are made before training."""
    finetune: dict[str, Any] = field(default_factory=dict)
    after: list[dict[str, Any]] = field(default_factory=list)
    """Methods that are tried on the trained model, each evaluated."""
    teacher: str = ""
    """As `start`: the dense original, for distillation and for text of its own."""
    text: str = "real"
    """"self": the teacher writes it."""
    checks: int = 8
    """How often the perplexity on the validation text is taken on the way."""
    cett: bool = False
    preactivations: bool = False
    keep: bool = False

    @property
    def settings(self) -> Finetune:
        return from_mapping(Finetune, self.finetune, self.name)

    def needs(self) -> list[str]:
        """Return the names of the jobs whose models this one starts from."""
        return [n.removeprefix(OWN_MODEL) for n in (self.start, self.teacher) if n.startswith(OWN_MODEL)]


@dataclass(frozen=True)
class Result:
    """What came of a job."""

    job: dict[str, Any]
    tokens: int
    seconds: float
    curve: list[dict[str, Any]]
    """Losses and zeros while training."""
    checks: list[tuple[int, float]]
    """Tokens trained on, and nats per token on the validation text."""
    before: Evaluation | None
    """With its zeros, before any training."""
    final: Evaluation
    after: list[Evaluation]
    preactivations: dict[str, Any]


def run(job: Job, work: Path) -> Result:
    """Train as the job says, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    texts = Texts(work)
    settings = dataclasses.replace(job.settings, compile=device.type == "cuda")
    model = _starting_model(job, work).to(device)  # type: ignore[arg-type]
    teacher = load_model(_folder(job.teacher, work)).to(device) if job.teacher else None  # type: ignore[arg-type]
    pre = {"before": _preactivations(model, texts)} if job.preactivations else {}
    before = None
    if job.sparsify:
        _sparsify(model, job.sparsify, texts, job.finetune)
    if job.start != "new":
        before = evaluate(model, texts, cett=False)
    if job.text == "self":
        assert teacher is not None
        count, bos = settings.steps * settings.batch_size, texts.tokenizer.bos_token_id
        windows = write_windows(teacher, count, settings.window, settings.seed, bos)
    else:
        windows = texts.train(settings.window)

    checks: list[tuple[int, float]] = []
    curve: list[dict[str, Any]] = []
    every = max(1, settings.steps // settings.log_steps // job.checks) if job.checks else 0

    def on_log(log: dict[str, Any]) -> None:
        curve.append(log)
        if every and len(curve) % every == 0:
            checks.append((log["tokens"], perplexity(model, texts.valid[:128], 64).nats_per_token))

    done = finetune(model, settings, windows, teacher=teacher, on_log=on_log)
    final = evaluate(model, texts, cett=job.cett)
    if job.preactivations:
        pre["after"] = _preactivations(model, texts)
    if job.keep:
        save_checkpoint(model, texts.tokenizer, work / "models" / job.name)
    after = []
    for method in job.after:
        _sparsify(model, method, texts, job.finetune)
        after.append(evaluate(model, texts, cett=False))
    return Result(
        dataclasses.asdict(job), done.tokens, done.seconds, _thinned(curve), checks, before, final, after, pre
    )


def _starting_model(job: Job, work: Path) -> Any:
    if job.start == "new":
        texts = Texts(work)
        return new_model(job.shape, job.activation, len(texts.tokenizer), job.settings.seed)
    return load_model(_folder(job.start, work))


def _folder(start: str, work: Path) -> str | Path:
    return work / "models" / start.removeprefix(OWN_MODEL) if start.startswith(OWN_MODEL) else start


def _sparsify(model: Any, method: dict[str, Any], texts: Texts, finetune: dict[str, Any]) -> None:
    from relufy.methods.sparsify import sparsify

    recipe = recipe_from_mapping(
        {"name": method["method"], "sparsify": method, "finetune": finetune}, "study"
    )
    sparsify(model, recipe, texts.train(256)[:256].astype(np.int64))


def _preactivations(model: Any, texts: Texts) -> dict[str, Any]:
    from relufy.measure.preactivations import measure_preactivations

    return to_mapping(measure_preactivations(model, texts.valid[:64], 64))


def _thinned(curve: list[dict[str, Any]], most: int = 60) -> list[dict[str, Any]]:
    """Return evenly chosen entries, the last among them, without what varies from machine to machine."""
    step = max(1, len(curve) // most)
    kept = curve[::-step][::-1]
    return [{key: value for key, value in log.items() if key != "tokens_per_second"} for log in kept]


def main() -> None:
    """Run the job that the first argument describes."""
    description, work = Path(sys.argv[1]), Path(sys.argv[2])
    job = Job(**json.loads(description.read_text()))
    result = run(job, work)
    print(f"{result.tokens / max(result.seconds, 1e-9):,.0f} tokens/s while training", flush=True)
    with replacing(work / "results" / f"{job.name}.json") as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(result)))


if __name__ == "__main__":
    main()
