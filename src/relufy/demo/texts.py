"""The demo's windows of text: written by the dense model itself, or two disjoint parts of the user's file."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relufy.demo.result import Texts
from relufy.demo.watch import Watch
from relufy.errors import UserError
from relufy.measure.overlap import overlap
from relufy.recipe import Finetune
from relufy.text import read_windows
from relufy.train.selftext import write_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_TEST_WINDOWS = 64
TEST_SEED = 2_000_003
"""Apart from every recipe's seed, so that held-out text is another text."""
TEST_SHARE = 0.1
"""Share of the user's text that is held out: its end."""


@dataclass(frozen=True)
class Windows:
    """Training and held-out windows, int64 [windows, length], and what to say of them."""

    train: np.ndarray
    test: np.ndarray
    about: Texts


def prepare(
    dense: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    finetune: Finetune,
    text: Path | None,
    watch: Watch,
) -> Windows:
    """Return the windows to train and to test on, with their overlap checked."""
    if text is not None:
        return _from_user(tokenizer, finetune.window, text)
    return _self_written(dense, tokenizer, finetune, watch)


def _self_written(dense: Any, tokenizer: Any, finetune: Finetune, watch: Watch) -> Windows:
    def write(task: str, count: int, seed: int) -> np.ndarray:
        report = lambda done, total: watch.progress(task, done, total, "windows")  # noqa: E731
        return write_windows(dense, count, finetune.window, seed, tokenizer.bos_token_id, progress=report)

    train = write("writing training text", finetune.steps * finetune.batch_size, finetune.seed)
    test = write("writing held-out text", NUM_TEST_WINDOWS, TEST_SEED)
    description = (
        "Both texts were written by the dense model itself (temperature 1, different seeds), so the figures "
        "show fidelity to the dense model, not quality."
    )
    return Windows(train, test, _about("self", description, train, test))


def _from_user(tokenizer: Any, window: int, text: Path) -> Windows:
    windows = read_windows([text], tokenizer, window)
    num_test = min(NUM_TEST_WINDOWS, max(2, round(len(windows) * TEST_SHARE)))
    if len(windows) <= num_test:
        raise UserError(
            f"{text} fills only {len(windows)} windows of {window} tokens; the demo needs 3 or more"
        )
    train, test = windows[:-num_test], windows[-num_test:]
    description = f"Trained on the beginning of {text.name} and tested on its end, which no fine-tune saw."
    return Windows(train, test, _about("text", description, train, test))


def _about(kind: str, description: str, train: np.ndarray, test: np.ndarray) -> Texts:
    found = overlap(train, test)
    description += (
        f" Overlap, checked: {found.identical_windows} of the {found.windows} held-out windows and "
        f"{found.seen_share:.2%} of their {found.ngram}-grams are in the training text."
    )
    return Texts(
        kind=kind,
        description=description,
        window=int(train.shape[1]),
        train_tokens=int(train[:, 1:].size),
        test_tokens=int(test[:, 1:].size),
        overlap=asdict(found) | {"seen_share": found.seen_share},
    )
