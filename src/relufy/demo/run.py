"""The demo from its first step to its last file: numbers go into a DemoResult, showing is the Watch's."""

import json
import shutil
import time
from pathlib import Path

from relufy.bench.machine import last_level_cache_bytes
from relufy.demo import commands
from relufy.demo.machine import machine_facts
from relufy.demo.options import STAGES, DemoOptions
from relufy.demo.result import DemoResult, Variant
from relufy.demo.watch import Silent, Watch
from relufy.files import refuse_occupied, replacing
from relufy.hub import model_folder, read_config
from relufy.recipe import Finetune


def run_demo(options: DemoOptions, watch: Watch | None = None) -> DemoResult:
    """Run the whole demo and write checkpoints, packed files, demo.json and report.html into the output.

    An earlier demo's folder is replaced; any other folder that is not empty is refused (UserError).
    """
    from relufy.report.render import render_demo

    started = time.monotonic()
    if (options.output / "demo.json").is_file():
        shutil.rmtree(options.output)
    refuse_occupied(options.output, by_folder=True)
    with replacing(options.output) as folder:
        folder.mkdir()
        result = _run(options, folder, watch or Silent())
        result.seconds = time.monotonic() - started
        document = result.to_json()
        (folder / "demo.json").write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        (folder / "report.html").write_text(render_demo(document))
    return result


def _run(options: DemoOptions, folder: Path, watch: Watch) -> DemoResult:
    from relufy.demo import engine_runs, stages
    from relufy.demo.about import describe_model
    from relufy.demo.texts import prepare
    from relufy.engine.spec import decoder_spec
    from relufy.model.checkpoint import load_model, load_tokenizer

    source = model_folder(options.model)
    decoder_spec(read_config(source))  # refuses early what the engine can't run in the end
    watch.step("the dense model", commands.info(options))
    dense, tokenizer = load_model(source), load_tokenizer(source)
    about = describe_model(options.model, source, dense)
    watch.say(about["description"])
    windows = prepare(dense, tokenizer, _longest_finetune(options), options.text, watch)
    watch.say(windows.about.description)
    bench = stages.Bench(options, source, dense, tokenizer, windows, folder, watch)

    variants, model = [stages.dense_variant(bench)], dense
    for previous, stage in zip((None, *STAGES), STAGES, strict=False):
        variant, model = stages.relufy_stage(bench, stage, previous, model)
        variants.append(variant)
    if bench.has_real_text:
        stages.train_control(bench, variants[1:])
    _run_on_engine(variants, source, options, folder, watch)
    steps = commands.every_step(options, engine_runs.SHOWN_TOKENS)
    result = DemoResult(about, windows.about, variants, options.prompt, steps, machine_facts())
    dense_cost = variants[0].cost
    assert dense_cost is not None
    result.fits_in_cache = dense_cost.bytes_engine < (last_level_cache_bytes() or 0)
    return result


def _longest_finetune(options: DemoOptions) -> Finetune:
    """Return the fine-tune that needs the most text; the others train on a part of it."""
    finetunes = [options.recipe(stage).finetune for stage in STAGES]
    return max(finetunes, key=lambda settings: settings.steps * settings.batch_size)


def _run_on_engine(
    variants: list[Variant], source: Path, options: DemoOptions, folder: Path, watch: Watch
) -> None:
    from relufy.demo import engine_runs

    command = commands.generate(options, STAGES[-1], engine_runs.SHOWN_TOKENS)
    watch.step("the engine: pack, and generate in turns", command)
    for stage, variant in zip((None, *STAGES), variants, strict=True):
        checkpoint = folder / stage.folder if stage else source
        engine_runs.pack_variant(variant, checkpoint, commands.packed_file(folder, stage))
    engine_runs.take_turns(variants, folder, options.prompt, watch)
