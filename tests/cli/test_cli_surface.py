"""The command line's surface, written down: a change here is a change that users see."""

import pytest
import typer

from relufy.cli.main import app, run

CHOICE = (
    "--temperature --top-k --top-p --min-p --repetition-penalty --presence-penalty --frequency-penalty"
    " --logit-bias --seed --stop --context-policy --keep --reuse --reuse-window --reuse-policy --predictor"
    " --speculative --gamma --min-probability --adaptive"
)
OPENING = "--threads --context --dtype --kv-dtype --mlock --no-mmap --load"

SURFACE = {
    "": "--version",
    "bench": "",
    "bench batch": "--shape --model --dtype --mlp-density --input-density --threads --batch --context"
    " --against --turns --tokens --no-mmap --load -o --output --plot --json",
    "bench crossover": "--threads --again -o --output --json",
    "bench decode": "--shape --model --dtype --mlp-density --input-density --threads --context --against"
    " --turns --tokens --reuse --reuse-window --reuse-policy --window-union --predictor"
    " --candidate-density --no-mmap --load -o --output --plot --json",
    "bench kernels": "--shape --dtype --threads --turns -o --output --json",
    "bench measure": "--model --shape --stage --windows --window --batch-size --device --turns -o --output"
    " --json",
    "bench plot": "results --plot",
    "bench prefill": "--shape --model --dtype --mlp-density --input-density --threads --against --turns"
    " --tokens --no-mmap --load -o --output --plot --json",
    "bench speculative": "model --draft --speculative --text --gammas --dtype --threads --context --tokens"
    " --temperature --turns --no-mmap --load -o --output --json",
    "cache": "",
    "cache clear": "--json",
    "cache list": "--json",
    "chat": f"model --system --template --plain --max-new-tokens {CHOICE} {OPENING}",
    "compare": "model --text --calibration --methods --targets --own-targets --mode --window --max-windows"
    " --calibration-tokens --set --no-controls --speed --threads --dtype --seed --allow-same-text -o --output"
    " --json",
    "demo": "-o --output --text --model --prompt --steps --learning-rate --json",
    "doctor": "model --text --control --quick --windows --window --json",
    "eval": "model --before --text --tasks --task-folder --backend --limit --num-fewshot --batch-size"
    " --window --max-windows --dtype --threads --device -o --output --json",
    "finetune": "model -o --output --recipe --data --dense --steps --learning-rate --batch-size"
    " --seed --target --lora --set --resume --log --tensorboard --shard --dtype --json",
    "generate": f"model prompt --max-new-tokens --logprobs --quiet --json {CHOICE} {OPENING}",
    "info": "model --json",
    "measure": "model --text --dense --window --max-windows --batch-size --shift --target --device"
    " --precision --by-layer --extended -o --output --json",
    "measure extended": "model --text --window --max-windows --only --cett-target --percent --rank --mac"
    " --weight-read --event --batch-size --seed --json",
    "measure law": "run --site --skip --average --json",
    "measure overtime": "model --text --window --max-windows --site --reuse-windows --gammas --warmup --reset"
    " --batch-size --seed --json",
    "measure reuse": "model --text --gammas --policies --reuse-window --share --most-missed --window"
    " --warm-up --max-windows --dtype --threads --tokens --turns --control -o --output --plot"
    " --json",
    "pack": "model -o --output --dtype --for --text --lora --lora-scale --json",
    "predictor": "model -o --output --text --test --rank --kind --recall --weighted --window --max-windows"
    " --rounds --learning-rate --seed --json",
    "pretrain": "-o --output --config --data --activation --tokenizer --train-tokenizer --steps --batch-size"
    " --window --learning-rate --optimizer --schedule --penalty-target --seed --set --resume --log"
    " --tensorboard --shard --dtype --json",
    "recipes": "name",
    "report": "runs -o --output --title",
    "sparsify": "model -o --output --recipe --method --calibration --data --sparsity --set --budget --minutes"
    " --selection --test --windows --window --dtype --threads --seed --no-measure --plot --json",
    "verify": "file --json",
}


def surface_of(command: object, path: str = "") -> dict[str, set[str]]:
    """Return every command's path and the options and arguments that it takes, `--help` aside."""
    words = {word for parameter in command.params for word in parameter.opts} - {"-h", "--help"}  # type: ignore[attr-defined]
    found = {path: words}
    for name, child in getattr(command, "commands", {}).items():
        found |= surface_of(child, f"{path} {name}".strip())
    return found


def test_surface() -> None:
    assert surface_of(typer.main.get_command(app)) == {
        path: set(words.split()) for path, words in SURFACE.items()
    }


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("relufy ")


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "Usage: relufy" in capsys.readouterr().out


def test_every_command_says_what_it_does() -> None:
    def helps(command: object) -> list[str | None]:
        children = getattr(command, "commands", {}).values()
        return [command.help, *(text for child in children for text in helps(child))]  # type: ignore[attr-defined]

    assert all(helps(typer.main.get_command(app)))
