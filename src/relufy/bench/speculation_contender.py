"""Our engine on one packed file, which continues passages plainly or speculatively (worker.py runs it)."""

import time
from typing import Any

from relufy.bench.contenders import SPARE_POSITIONS, Turn, engine_facts
from relufy.engine.cpu import CpuEngine
from relufy.engine.sampling import Sampling
from relufy.engine.speculation import LOOKUP, SELF, Speculation
from relufy.engine.speculator import Speculator


class SpeculationContender:
    """Continues prompts. `draft` is a packed file, "lookup" or "self"; None can only be plain."""

    def __init__(
        self,
        path: str,
        threads: int,
        positions: int,
        kv_dtype: str,
        draft: str | None,
        load: bool = False,
        temperature: float = 0.0,
    ):
        context = positions + (SPARE_POSITIONS if draft == SELF else 0)
        self._engine = CpuEngine(path, threads, context, kv_dtype=kv_dtype, load=load)
        self._draft, self._drafter = draft, None
        if draft not in (None, LOOKUP, SELF):
            self._drafter = CpuEngine(
                draft,
                context=positions + SPARE_POSITIONS,
                kv_dtype=kv_dtype,
                load=load,
                threads_of=self._engine,
            )
        self._temperature = temperature
        self._prompts: list[list[int]] = []

    def read(self, prompts: list[list[int]]) -> None:
        self._prompts = prompts

    def write(self, prompt: int, gamma: int, count: int) -> Turn | None:
        """Continue one of the prompts by `count` tokens; gamma 0 is plain decoding.

        Reading the prompt is not timed. None without a draft.
        """
        if gamma and self._draft is None:
            return None
        speculation = Speculation(self._draft, gamma) if gamma and self._draft else None
        engine, (*past, last) = self._engine, self._prompts[prompt]
        sampling = Sampling(self._temperature, seed=prompt)
        sequence = engine.new_sequence(len(past) + 1, speculation.keeps if speculation else None)
        done = engine.reuse_prefix(sequence, [*past, last])
        if past[done:]:
            engine.step([(sequence, past[done:])], "none")
        turn = (
            self._speculate(sequence, last, speculation, count, sampling)
            if speculation
            else self._plain(sequence, last, count, sampling)
        )
        engine.free(sequence)
        return turn

    def facts(self) -> dict[str, Any]:
        return engine_facts(self._engine)

    def _plain(self, sequence: int, last: int, count: int, sampling: Sampling) -> Turn:
        before, start = self._engine.stats(), time.perf_counter()
        chosen = self._engine.decode(sequence, [last], count, sampling=sampling)
        seconds, after = time.perf_counter() - start, self._engine.stats()
        sparsity = self._engine.sparsity(before, after)
        return {
            "seconds": seconds,
            "tokens": count,
            **{key: after[key] - before[key] for key in ("weight_bytes", "kv_bytes")},
            "density": {site: [1 - share for share in shares] for site, shares in sparsity.items()},
            "text": [choice.token for choice in chosen],
        }

    def _speculate(
        self, sequence: int, last: int, speculation: Speculation, count: int, sampling: Sampling
    ) -> Turn:
        speculator = Speculator(self._engine, speculation, self._drafter)
        speculator.read(sequence, last)
        start = time.perf_counter()
        chosen = speculator.decode(sequence, [last], count, count, sampling=sampling)
        seconds = time.perf_counter() - start
        speculator.close()
        stats = speculator.stats()
        return {
            "seconds": seconds,
            "tokens": count,
            "weight_bytes": stats.draft_weight_bytes + stats.verify_weight_bytes,
            "kv_bytes": stats.draft_kv_bytes + stats.verify_kv_bytes,
            "speculation": stats.document(),
            "text": [choice.token for choice in chosen],
        }
