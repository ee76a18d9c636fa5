"""Text to calibrate on, as commands take it: files, or what the model writes itself."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relufy.cli.progress import ProgressDisplay

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from relufy.method import Calibration

SELF = "self"
"""The word for text that the model writes itself."""

CalibrationText = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        "--data",
        help="Text to calibrate on: a file (UTF-8, .jsonl with texts or chats, or .gz; may be repeated), "
        "or 'self': the model writes it.",
    ),
]


def calibration_windows(
    texts: Sequence[str],
    model: "PreTrainedModel",
    tokenizer: Any,
    wanted: "Calibration",
    display: ProgressDisplay,
) -> "np.ndarray":
    """Return windows drawn from the files, or written by the model, int64 `[windows, length]`.

    Raises UserError for windows longer than the model can read, and for unfit files.
    """
    from relufy.errors import UserError
    from relufy.text import refuse_long_windows
    from relufy.text_sample import sample_windows
    from relufy.train.selftext import write_windows

    longest = getattr(model.config, "max_position_embeddings", None)
    refuse_long_windows(wanted.window, longest, f"; give --set calibrate.window={longest}")
    count = max(1, wanted.tokens // wanted.window)
    if SELF not in texts:
        return sample_windows(texts, tokenizer, wanted.window, count, wanted.seed)
    if len(texts) > 1:
        raise UserError("the calibration text is either files or 'self', not both")
    start = tokenizer.bos_token_id

    def show(done: int, total: int) -> None:
        display.update("writing text", done, total, "windows")

    return write_windows(model, count, wanted.window, wanted.seed, start, progress=show)
