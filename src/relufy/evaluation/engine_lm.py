"""The CPU engine as a model of lm-evaluation-harness: what HFLM does, token for token.

The same special tokens, the same truncation and rolling windows, and texts cut at the same stops. Contexts
that several choices or documents share are read once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from relufy.engine.engine import Engine
from relufy.engine.generate import Generation
from relufy.engine.request import make_request
from relufy.engine.scoring import score_continuations
from relufy.errors import UserError
from relufy.evaluation.truncation import Truncation

DEFAULT_NEW_TOKENS = 256
"""HFLM's, where a task does not say."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""What a task may say about sampling, besides `do_sample`."""


class EngineLM(TemplateLM):
    """An opened engine for `lm_eval.evaluate`. `cuts` tells afterwards what was cut."""

    def __init__(self, engine: Engine, batch_size: int = 8):
        super().__init__()
        self.engine = engine
        self.batch_size = batch_size
        self.cuts = Truncation(engine.context)

    @property
    def eot_token_id(self) -> int:
        found = self.engine.tokenizer.named_id("eos_token")
        if found is None:
            found = min(self.engine.tokenizer.eos_ids, default=None)
        if found is None:
            raise UserError("the model names no token that ends a text (eos_token in tokenizer_config.json)")
        return found

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: the token that begins texts, else the end's."""
        found = self.engine.tokenizer.named_id("bos_token")
        return self.eot_token_id if found is None else found

    @property
    def max_length(self) -> int:
        return self.engine.context

    @property
    def tokenizer_name(self) -> str:
        return str(self.engine.header.path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens; a text that already begins with the special token does not get another one."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self._piece(self.prefix_token_id))
        return self.engine.tokenizer.encode(string, add_special_tokens)

    def _piece(self, token: int) -> str:
        return self.engine.tokenizer.piece(token)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(self.cuts.fitted(context, text), text) for _, context, text in requests]
        with tqdm(total=len(pairs), desc="log-likelihoods", disable=disable_tqdm or None) as bar:
            scores = score_continuations(self.engine, pairs, self.batch_size, bar.update)
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of whole texts, in windows as long as the model can read."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            found = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += found
            owners += [owner] * len(found)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True
        ):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the engine writes after each context, until a stop text."""
        order = sorted(range(len(requests)), key=lambda index: requests[index].args[0])  # alike side by side
        texts = {
            index: self._generate(*requests[index].args, seed=index)
            for index in tqdm(order, desc="texts", disable=disable_tqdm or None)
        }
        return [texts[index] for index in range(len(requests))]

    def _generate(self, context: str, settings: Mapping[str, Any], seed: int) -> str:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), DEFAULT_NEW_TOKENS))
        stops = handle_stop_sequences(wanted.pop("until"), self._piece(self.eot_token_id))
        max_new_tokens = wanted.pop("max_gen_toks")
        if max_new_tokens >= self.max_length:
            raise UserError(
                f"a task asks for {max_new_tokens} new tokens, and the model has {self.max_length} positions"
            )
        prompt = self.cuts.prompt(self.tok_encode(context), max_new_tokens)
        options = _choice(wanted, seed) | {"stop": [stop for stop in stops if stop]}
        tokenizer = self.engine.tokenizer
        request = make_request(prompt, max_new_tokens, options, tokenizer.eos_ids)
        written = Generation(self.engine, tokenizer, request).run().token_ids
        return postprocess_generated_text(tokenizer.decode(written), stops, None)


def _choice(wanted: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return the engine's options for a task's sampling. Raises UserError for what it does not know."""
    does_sample = wanted.pop("do_sample", False)
    given = {name: wanted.pop(name) for name in SAMPLING if name in wanted}
    if wanted:
        raise UserError(
            f"a task asks for {', '.join(sorted(wanted))} in generating, which the engine has not: "
            "use the backend hf"
        )
    if not does_sample:
        return {name: given[name] for name in ("repetition_penalty",) if name in given}
    if not given.get("temperature"):
        raise UserError("a task asks for sampling without a temperature above 0; set one in its file")
    return given | {"seed": seed}
