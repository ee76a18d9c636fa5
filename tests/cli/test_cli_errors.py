"""How errors leave the program: one line and code 2 for the user's mistakes, 130 for Ctrl-C."""

import subprocess
import sys
from pathlib import Path

import pytest

from relufy.cli import main
from relufy.errors import UserError

BUDGET = ["sparsify", "bundled", "-o", "out", "--budget", "1%"]
TEAL = ["sparsify", "bundled", "-o", "out", "--recipe", "teal"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must be refused; return the one line that it says."""
    assert main.run(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("relufy: ")
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sparsify"], "Missing argument 'model'"),
        (["sparsify", "bundled", "-o", "out"], "give --recipe NAME or --budget 1%"),
        ([*BUDGET, "--recipe", "teal"], "one of them"),
        ([*BUDGET, "--sparsity", "0.5"], "--sparsity and --set belong to a recipe"),
        ([*TEAL, "--seed", "3"], "--seed belongs to --budget; of a recipe, --set calibrate.seed="),
        ([*TEAL, "--plot", "x.svg"], "--plot belongs to --budget"),
        ([*TEAL, "--set", "sparsify.step=[1"], "not valid YAML"),
        ([*TEAL, "--set", "sparsify.step=0.0"], "step must lie between 0 and 1"),
        ([*TEAL[:-1], "relufy-stage1", "--calibration", "self"], "looks at no text"),
        ([*TEAL[:-1], "greedy", "--set", "sparsify.loss_increase=0.5"], "factor of at least 1"),
        (BUDGET, "--budget needs text to search on"),
        ([*BUDGET[:-1], "0", "--calibration", "self"], "budget"),
        ([*BUDGET[:-1], "much", "--calibration", "self"], "budget"),
        ([*BUDGET, "--calibration", "nowhere.txt"], "no text file nowhere.txt"),
        (["nonsense"], "nonsense"),
        (["recipes", "--nonsense"], "--nonsense"),
        (["generate", "bundled", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "bundled", "x", "--temperature", "-1"], "--temperature"),
        (["generate", "bundled", "x", "--temperature", "nan"], "temperature"),
        (["generate", "bundled", "x", "--top-k", "-1"], "--top-k"),
        (["generate", "bundled", "x", "--top-p", "0"], "top_p must be above 0"),
        (["generate", "bundled", "x", "--min-p", "1.5"], "--min-p"),
        (["generate", "bundled", "x", "--repetition-penalty", "0"], "repetition_penalty must be"),
        (["generate", "bundled", "x", "--presence-penalty", "inf"], "presence_penalty must be"),
        (["generate", "bundled", "x", "--frequency-penalty", "1e9"], "frequency_penalty must be"),
        (["generate", "bundled", "x", "--logit-bias", "the=1"], "a token's id and a number, as 42=-1.5"),
        (["generate", "bundled", "x", "--logit-bias", "3=much"], "found '3=much'"),
        (["generate", "bundled", "x", "--logit-bias", "-3=1"], "0 or more"),
        (["generate", "bundled", "x", "--logit-bias", "4096=1"], "4096"),
        (["generate", "bundled", "x", "--seed", "-1"], "seed must be"),
        (["generate", "bundled", "x", "--stop", ""], "stop text is empty"),
        (["generate", "bundled", "x", "--logprobs", "3"], "--json"),
        (["generate", "bundled", "x", "--logprobs", "101", "--json"], "at most 100"),
        (["generate", "bundled", "x", "--context-policy", "slide"], "did you mean 'sliding'"),
        (["generate", "bundled", "x", "--context-policy", "sliding", "--keep", "511"], "context of 512"),
        (["generate", "bundled", "x", "--keep", "-1"], "--keep"),
        (["chat", "bundled"], "no chat template"),
        (["chat", "bundled", "--template", "nowhere.jinja"], "nowhere.jinja"),
        (["chat", "bundled", "--plain", "--template", "x"], "exclude each other"),
        (["chat", "bundled", "--plain", "--top-p", "0"], "top_p must be above 0"),
        (["pack", "bundled", "-o", "x", "--lora", "nowhere"], "not an adapter"),
        (["pack", "bundled", "-o", "x", "--lora-scale", "2"], "--lora-scale needs --lora"),
        (["recipes", "relufy-stage3"], "did you mean 'relufy-stage2'"),
        (["sparsify", "bundled", "-o", "out", "--recipe", "dense-control"], "makes no zeros"),
        (["sparsify", "nowhere", "-o", "out", "--recipe", "relufy-stage1"], "no checkpoint folder nowhere"),
        (
            ["sparsify", "bundled", "-o", "out", "--recipe", "teal"],
            "--calibration FILE, or --calibration self",
        ),
        ([*TEAL, "--calibration", "nowhere.txt"], "no text file nowhere.txt"),
        ([*TEAL, "--calibration", "self", "--calibration", "x"], "either files or 'self'"),
        ([*TEAL, "--calibration", "self", "--sparsity", "1"], "sparsity must lie between 0 and 1, found 1"),
        ([*TEAL, "--calibration", "self", "--sparsity", "0"], "sparsity must lie between 0 and 1, found 0"),
        ([*TEAL, "--calibration", "self", "--set", "calibrate.window=4096"], "longer than the 512"),
        ([*TEAL, "--calibration", "self", "--set", "sparsify.allocation=best"], "expected one of 'greedy'"),
        (["cache"], "Missing command"),
        (["verify", "nowhere.relufy"], "nowhere.relufy"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals_are_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_name_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "see relufy sparsify --help" in refused(capsys, "sparsify")


@pytest.mark.parametrize("command", ["sparsify", "finetune"])
def test_occupied_output_is_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    (tmp_path / "precious").write_text("mine")
    data = ["--data", "self"] if command == "finetune" else []
    arguments = [command, "bundled", "-o", str(tmp_path), "--recipe", "relufy-stage1", *data]
    assert "exists and is not empty" in refused(capsys, *arguments)
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_line_break_in_a_message_stays_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise UserError("first\nsecond")

    monkeypatch.setattr(main, "app", fail)
    assert refused(capsys) == "relufy: first second\n"


@pytest.mark.parametrize(
    ("package", "extra"), [("torch", "train"), ("transformers.models", "train"), ("matplotlib", "report")]
)
def test_missing_package_names_its_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str, extra: str
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(main, "app", fail)
    assert f'pip install "relufy[{extra}]"' in refused(capsys)


def test_other_import_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise ModuleNotFoundError("No module named 'relufy.nonsense'", name="relufy.nonsense")

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(ModuleNotFoundError):
        main.run([])


def test_ctrl_c_is_quiet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("relufy.recipe.shipped_recipes", interrupt)
    assert main.run(["recipes"]) == 130
    assert capsys.readouterr().err == ""


def test_module_and_exit_code() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "relufy", "nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["sparsify", "finetune", "demo"])
def test_a_folder_is_not_written_over_a_file(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("mine")
    more = {"sparsify": ["bundled"], "finetune": ["bundled", "--data", "self"], "demo": []}[command]
    recipe = [] if command == "demo" else ["--recipe", "relufy-stage1"]
    assert main.run([command, *more, "-o", str(file), *recipe]) == 2
    assert "is a file" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("mine.txt", "mine")]


def test_what_the_system_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main.run(["pack", "bundled", "-o", str(tmp_path / "file" / "below")]) == 2
    assert main.run(["pack", "bundled", "-o", str(tmp_path / ("x" * 300))]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
