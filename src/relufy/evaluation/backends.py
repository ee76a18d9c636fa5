"""The two ways to run a model here, Hugging Face's transformers and our engine: one interface."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from relufy.errors import UserError
from relufy.evaluation.options import EvalOptions

if TYPE_CHECKING:
    from lm_eval.api.model import LM


class Backend(Protocol):
    """A loaded model.

    `longest` is how many tokens it can read, `bos` the token that begins its texts, `config` its config.json.
    """

    config: dict[str, Any]
    bos: int | None
    longest: int | None

    def encode(self, text: str) -> tuple[Sequence[int], Sequence[int]]:
        """Return tokens without special ones, and the character that each ends at."""
        ...

    def logprobs(self, windows: Sequence[Sequence[int]]) -> list[float]:
        """Return the log-probability of all tokens but the first, of each window."""
        ...

    def harnessed(self) -> "LM":
        """Return the model for lm-evaluation-harness, with a `cuts`."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return how it computes, as plain data."""
        ...


def open_backend(model: str | Path, options: EvalOptions) -> Backend:
    """Load a model as the options say. Raises UserError."""
    return EngineBackend(model, options) if options.backend == "engine" else HfBackend(model, options)


class EngineBackend:
    """The CPU engine: a packed file, or a checkpoint that is packed into the cache. No torch."""

    def __init__(self, model: str | Path, options: EvalOptions):
        from relufy.engine.cache import packed_model
        from relufy.engine.engine import Engine
        from relufy.engine.packed_file import is_packed_file, read_header
        from relufy.engine.spec import MAX_CONTEXT

        path = Path(model)
        if not is_packed_file(path):
            path = packed_model(model, options.dtype or "f32")
        elif options.dtype is not None:
            raise UserError(f"{path} is packed already; dtype is for a checkpoint")
        longest = int(read_header(path).numbers["max_context"])
        room = min(MAX_CONTEXT, (options.batch_size + 1) * (longest + 64))
        self._engine = Engine(path, threads=options.threads, context=room)
        self._batch_size = options.batch_size
        self.config: dict[str, Any] = self._engine.header.metadata().get("config", {})
        self.longest: int | None = self._engine.context
        self.bos = self._engine.tokenizer.named_id("bos_token")

    def encode(self, text: str) -> tuple[Sequence[int], Sequence[int]]:
        return self._engine.tokenizer.encode_with_ends(text)

    def logprobs(self, windows: Sequence[Sequence[int]]) -> list[float]:
        from relufy.engine.scoring import score_continuations

        pairs = [(window[:1], window[1:]) for window in windows]
        return [score.logprob for score in score_continuations(self._engine, pairs, self._batch_size)]

    def harnessed(self) -> "LM":
        from relufy.evaluation.engine_lm import EngineLM

        return EngineLM(self._engine, self._batch_size)

    def facts(self) -> dict[str, Any]:
        engine = self._engine
        return {
            "backend": "engine",
            "dtype": engine.header.metadata()["dtype"],
            "kv_dtype": engine.kv_dtype,
            "isa": engine.isa,
            "context": engine.context,
        }


class HfBackend:
    """Hugging Face's model in f32, with our sparsifiers in place."""

    def __init__(self, model: str | Path, options: EvalOptions):
        import torch

        from relufy.engine.packed_file import is_packed_file
        from relufy.hub import context_length
        from relufy.model.checkpoint import load_model, load_tokenizer

        if is_packed_file(Path(model)):
            raise UserError(f"{model} is a packed file, which only the engine runs: --backend engine")
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded: Any = load_model(model)
        try:
            self._model = loaded.to(device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device}: {' '.join(str(error).split())[:200]}") from None
        self._tokenizer: Any = load_tokenizer(model)
        self._batch_size = options.batch_size
        self.config: dict[str, Any] = self._model.config.to_dict()
        self.longest = context_length(self._model.config.get_text_config().to_dict())
        self.bos = self._tokenizer.bos_token_id

    def encode(self, text: str) -> tuple[Sequence[int], Sequence[int]]:
        if not self._tokenizer.is_fast:
            raise UserError("the model's tokenizer does not tell where its tokens end; it needs a fast one")
        found = self._tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        return found.input_ids, [end for _, end in found.offset_mapping]

    def logprobs(self, windows: Sequence[Sequence[int]]) -> list[float]:
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, window in enumerate(windows):
            by_length[len(window)].append(index)
        found = [0.0] * len(windows)
        for indices in by_length.values():
            for start in range(0, len(indices), self._batch_size):
                part = indices[start : start + self._batch_size]
                for index, total in zip(part, self._totals([windows[i] for i in part]), strict=True):
                    found[index] = total
        return found

    def _totals(self, windows: Sequence[Sequence[int]]) -> list[float]:
        """Return the log-probability of windows of one length."""
        import torch

        from relufy.measure.quality import evaluating, log_likelihood

        with evaluating(self._model):
            ids = torch.tensor([list(window) for window in windows], device=self._model.device)
            logits = self._model(input_ids=ids, use_cache=False).logits[:, :-1]
            return log_likelihood(logits, ids[:, 1:]).double().sum(1).tolist()

    def harnessed(self) -> "LM":
        from relufy.evaluation.hf_lm import HfLM

        return HfLM(self._model, self._tokenizer, self._batch_size)

    def facts(self) -> dict[str, Any]:
        return {
            "backend": "hf",
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "device": str(self._model.device),
            "context": self.longest,
        }
