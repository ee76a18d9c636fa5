"""Two processes measure what one does, exactly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counted import ragged, relufied, windows_of

from families import family
from relufy.cli.quiet import quiet_libraries
from relufy.measure.measure import measure
from relufy.measure.measurement import Measurement
from relufy.processes import is_main, join_processes, leave_processes
from together import run_together

CASES = {"many": 150, "uneven": 9, "fewer than processes": 3}
"""How many windows, in batches of four: more than unions keep; not the same for both; none for one."""


def found_in(case: str) -> Measurement:
    windows: Any = windows_of(CASES[case], 6) if case == "many" else ragged(CASES[case], 11)
    return measure(relufied(), windows, dense=family("llama"), batch_size=4)


def measure_all(folder: Path) -> dict[str, Measurement]:
    quiet_libraries()
    join_processes()
    found = {case: found_in(case) for case in CASES}
    leave_processes()
    return found


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Measurement]]:
    folder = tmp_path_factory.mktemp("together")
    return run_together(measure_all, folder, folder=folder)


@pytest.mark.parametrize("case", CASES)
def test_the_result_is_that_of_one_process(together, case: str) -> None:
    alone = found_in(case)
    assert together[0][case] == together[1][case] == alone
    assert np.isfinite(alone.perplexity.nats_per_token) and is_main()
