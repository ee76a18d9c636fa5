"""From one model to the next: relufy, fine-tune, measure before and after."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relufy.demo import commands
from relufy.demo.costs import cost_of
from relufy.demo.options import STAGES, DemoOptions, Stage
from relufy.demo.result import Estimate, Training, Variant
from relufy.demo.texts import Windows
from relufy.demo.watch import Watch
from relufy.measure.quality import Fidelity, fidelity, paired_difference, perplexity
from relufy.measure.sparsity import measure_sparsity
from relufy.methods.sparsify import sparsify
from relufy.model.checkpoint import save_checkpoint
from relufy.recipe import Finetune
from relufy.train.finetune import FinetuneResult, finetune

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Bench:
    """What every stage works with: the dense model of the folder `source`; `folder` takes the checkpoints."""

    options: DemoOptions
    source: Path
    dense: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    windows: Windows
    folder: Path
    watch: Watch

    @property
    def has_real_text(self) -> bool:
        return self.windows.about.kind == "text"


def dense_variant(bench: Bench) -> Variant:
    """Measure the dense model."""
    variant = Variant("dense", "dense", checkpoint=bench.options.model)
    measure_into(variant, bench, bench.dense, bench.source)
    if bench.has_real_text:
        variant.perplexity_before = perplexity_of(bench, bench.dense)
    return variant


def relufy_stage(
    bench: Bench, stage: Stage, previous: Stage | None, model: "PreTrainedModel"
) -> tuple[Variant, "PreTrainedModel"]:
    """Take the model of the stage before one stage further: fine-tuned, measured and saved.

    The bare swap that it is compared with is the dense model's, untrained.
    """
    recipe = bench.options.recipe(stage)
    command = commands.finetune(bench.options, stage, previous)
    bench.watch.step(stage.title, command)
    variant = Variant(stage.name, stage.title, checkpoint=stage.folder)
    bare = sparsify(copy.deepcopy(bench.dense), recipe)
    before = fidelity(bench.dense, bare, bench.windows.test)
    if bench.has_real_text:
        variant.perplexity_before = perplexity_of(bench, bare)

    model = sparsify(copy.deepcopy(model), recipe)
    done = train(bench, stage.name, model, recipe.finetune)
    term = "cross_entropy" if bench.has_real_text else "kl"
    curve = tuple(log[term] for log in done.logs)
    variant.training = Training(done.steps, done.tokens, done.seconds, curve, command)
    after = fidelity(bench.dense, model, bench.windows.test)
    variant.kl_before, variant.kl = _kl(before), _kl(after)
    if bench.has_real_text:
        variant.perplexity = perplexity_of(bench, model)
    else:
        drop = paired_difference(before, after)
        variant.kl_drop = Estimate(drop.mean, drop.standard_error, after.tokens)
    save_checkpoint(model, bench.tokenizer, bench.folder / stage.folder)
    measure_into(variant, bench, model, bench.folder / stage.folder)
    bench.watch.say(_summary(variant))
    return variant, model


def train_control(bench: Bench, variants: list[Variant]) -> None:
    """Fine-tune the dense model as the stages were, in turn; note its perplexity in each variant."""
    bench.watch.step("the control: the dense model, fine-tuned on the same tokens")
    model = copy.deepcopy(bench.dense)
    for stage, variant in zip(STAGES, variants, strict=True):
        train(bench, f"control for {variant.name}", model, bench.options.recipe(stage).finetune)
        variant.control = perplexity_of(bench, model)


def train(bench: Bench, name: str, model: "PreTrainedModel", settings: Finetune) -> FinetuneResult:
    """Fine-tune the model in place on the training windows, with progress."""

    def on_log(log: dict[str, Any]) -> None:
        detail = f"loss {log['loss']:.4f}  {log['tokens_per_second']:,.0f} tokens/s"
        bench.watch.progress(f"fine-tuning {name}", log["step"], settings.steps, detail)

    return finetune(model, settings, bench.windows.train, teacher=bench.dense, on_log=on_log)


def perplexity_of(bench: Bench, model: "PreTrainedModel") -> Estimate:
    """Return the perplexity on the held-out windows, its standard error by the delta method."""
    found = perplexity(model, bench.windows.test)
    return Estimate(found.perplexity, found.standard_error * found.perplexity, found.tokens)


def measure_into(variant: Variant, bench: Bench, model: "PreTrainedModel", checkpoint: Path) -> None:
    """Fill in the zeros on the held-out windows, and what a token costs at half a window of context."""
    windows = bench.windows.test
    shares = measure_sparsity(model, windows).sparsity
    variant.sparsity = {site: list(layers) for site, layers in shares.items()}
    variant.cost = cost_of(model, checkpoint, shares, context=windows.shape[1] // 2)


def _kl(found: Fidelity) -> Estimate:
    return Estimate(found.kl, found.standard_error, found.tokens)


def _summary(variant: Variant) -> str:
    assert variant.kl and variant.kl_before
    if variant.perplexity and variant.perplexity_before:
        before, after = variant.perplexity_before.value, variant.perplexity.value
        return f"perplexity: {before:.2f} after the bare swap, {after:.2f} after the fine-tune"
    return (
        f"KL to dense, nats per token: {variant.kl_before.value:.4f} after the bare swap, "
        f"{variant.kl.value:.4f} after the fine-tune; {variant.kl_closed or 0:.1%} closed"
    )
