"""A Hugging Face model of ours, sparsifiers in place, as a model of lm-evaluation-harness."""

import logging
import sys
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models import huggingface
from lm_eval.models.utils import normalize_gen_kwargs

from relufy.evaluation.truncation import Truncation

_HFLM: Any = huggingface.HFLM  # its decorator hides its type


class HfLM(_HFLM):
    """HFLM on a loaded model. `cuts` tells afterwards what was cut; only terminals see bars."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 8):
        logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)  # we say what was cut
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.cuts = Truncation(self.max_length)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        for _, context, continuation in requests:
            self.cuts.fitted(context, continuation)
        return super()._loglikelihood_tokens(requests, disable_tqdm or _is_quiet(), override_bs)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm or _is_quiet())

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return super().loglikelihood_rolling(requests, disable_tqdm or _is_quiet())

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            asked: Any = request.args
            wanted: dict[str, Any] = dict(normalize_gen_kwargs(asked[1], self.max_gen_toks))
            self.cuts.prompt(self.tok_encode(asked[0]), wanted["max_gen_toks"])
        return super().generate_until(requests, disable_tqdm or _is_quiet())


def _is_quiet() -> bool:
    return not sys.stderr.isatty()
