"""A Hugging Face model of ours, sparsifiers in place, as a model of lm-evaluation-harness."""

import logging
import sys
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from relufy.evaluation.truncation import Truncation


class HfLM(HFLM):
    """HFLM on a loaded model. `truncation` tells afterwards what was cut; only terminals see bars."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 8):
        logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)  # we say what was cut
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.truncation = Truncation(self.max_length)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        for _, context, continuation in requests:
            self.truncation.fitted(context, continuation)
        return super()._loglikelihood_tokens(requests, disable_tqdm or _is_quiet(), override_bs)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm or _is_quiet())

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return super().loglikelihood_rolling(requests, disable_tqdm or _is_quiet())

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            context, settings = request.args
            wanted = normalize_gen_kwargs(settings, self.max_gen_toks)
            self.truncation.prompt(self.tok_encode(context), wanted["max_gen_toks"])
        return super().generate_until(requests, disable_tqdm or _is_quiet())


def _is_quiet() -> bool:
    return not sys.stderr.isatty()
