"""The types of the C++ module (csrc/bindings.cpp)."""

import numpy as np

class FileError(ValueError): ...
class OutOfKv(RuntimeError): ...

class Sampling:
    def __init__(
        self,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        logit_bias: list[tuple[int, float]],
        seed: int,
    ) -> None: ...

class Reuse:
    def __init__(
        self,
        policy: str,
        period: int,
        window: int,
        share: float,
        resets: bool,
        most_missed: float,
        is_control: bool,
    ) -> None: ...

ChosenTuple = tuple[int, float, tuple[tuple[int, float], ...]]

class Engine:
    def __init__(
        self,
        path: str,
        threads: int,
        context: int,
        skip: bool,
        kv_dtype: str,
        load: bool,
        mlock: bool,
        threads_of: Engine | None,
    ) -> None: ...
    def new_sequence(self, prompt_length: int, reuse: Reuse | None, num_open: int) -> int: ...
    def fork(self, sequence: int, reuse: Reuse | None) -> int: ...
    def refuses_candidates(self) -> str: ...
    def truncate(self, sequence: int, length: int) -> None: ...
    def free(self, sequence: int) -> None: ...
    def length(self, sequence: int) -> int: ...
    def tokens(self, sequence: int) -> list[int]: ...
    def reuse_prefix(self, sequence: int, tokens: np.ndarray) -> int: ...
    def step(self, work: list[tuple[int, np.ndarray]], logits: str, out: np.ndarray) -> None: ...
    def decode(
        self,
        sequence: int,
        tokens: np.ndarray,
        count: int,
        stops: np.ndarray,
        sampling: Sampling,
        logprobs: int,
    ) -> list[ChosenTuple]: ...
    def choose(
        self, sequence: int, logits: np.ndarray, sampling: Sampling, logprobs: int, length: int | None
    ) -> ChosenTuple: ...
    def probabilities(
        self, sequence: int, logits: np.ndarray, sampling: Sampling, length: int | None, out: np.ndarray
    ) -> None: ...
    def huge_page_share(self) -> float: ...
    def stats(self) -> dict: ...
    def reset_stats(self) -> None: ...
    def set_crossover(self, kernel: str, dtype: str, tokens: int, share: float) -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def free_positions(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_context(self) -> int: ...

class Speculator:
    def __init__(
        self,
        engine: Engine,
        draft: Engine | None,
        gamma: int,
        is_adaptive: bool,
        least_probability: float,
        least_match: int,
        window: int,
    ) -> None: ...
    def read(self, sequence: int, next: int) -> None: ...
    def decode(
        self,
        sequence: int,
        tokens: np.ndarray,
        count: int,
        most: int,
        stops: np.ndarray,
        sampling: Sampling,
        logprobs: int,
    ) -> list[ChosenTuple]: ...
    def counts(self) -> dict: ...

def isa() -> str: ...
def read_bandwidth(threads: int, bytes: int, seconds: float) -> float: ...
def kernel_bandwidth(
    kernel: str, dtype: str, rows: int, columns: int, density: float, threads: int, seconds: float
) -> float: ...
def measure_crossover(
    kernel: str, dtype: str, rows: int, columns: int, tokens: int, threads: int, seconds: float
) -> float: ...
