"""The programs of the studies: their plans can be carried out, their documents follow from their results."""

import dataclasses
import json
from importlib import import_module
from pathlib import Path

import pytest
from studies.job import Job
from studies.report import with_tables, write
from studies.summary import Seeds, table

from conftest import REPOSITORY

STUDIES = (
    *("activations", "recovery", "prosparse", "data_free", "stage2"),
    *("bundled", "bundled_sparse", "large", "decoding"),
)
KEPT = REPOSITORY / "docs" / "studies"


def whole_plan() -> dict[str, Job]:
    """Return the jobs of all studies, as if each had ended with the same figures."""
    modules = [import_module(f"studies.{name}") for name in STUDIES]
    result = {"final": {"valid": 3.5}, "curve": [{"penalty_strength": 0.01}]}
    done: dict[str, Job] = {}
    while True:
        planned = [job for module in modules for job in module.plan(dict.fromkeys(done, result))]
        ready = [job for job in planned if job.name not in done and all(n in done for n in job.needs())]
        if not ready:
            assert {job.name for job in planned} == set(done), "a job waits for what nobody trains"
            return done
        done |= {job.name: job for job in ready}


def test_plans_end_and_every_job_is_well_formed() -> None:
    plan = whole_plan()
    assert len(plan) > 80
    for name, job in plan.items():
        assert job.settings.steps > 100 and Job(**json.loads(json.dumps(dataclasses.asdict(job)))) == job, (
            name
        )


def test_a_tuned_arm_takes_the_rate_that_validation_text_likes_best() -> None:
    from studies.plans import tuned

    def arm(rate: float, seed: int) -> Job:
        return Job(f"{rate}-{seed}")

    assert [job.name for job in tuned(arm, (1.0, 2.0), 3, {})] == ["1.0-0", "2.0-0"]
    done = {"1.0-0": {"final": {"valid": 3.0}}, "2.0-0": {"final": {"valid": 2.0}}}
    assert [job.name for job in tuned(arm, (1.0, 2.0), 3, done)][2:] == ["2.0-1", "2.0-2"]


@pytest.mark.parametrize("folder", sorted(KEPT.glob("*/tables.md")), ids=lambda path: path.parent.name)
def test_kept_tables_are_those_of_the_kept_results(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    name = folder.parent.name
    assert (write(name, KEPT, tmp_path) / "tables.md").read_text() == folder.read_text()
    assert (tmp_path / name / "results.json").read_text() == (KEPT / name / "results.json").read_text()


@pytest.mark.parametrize("folder", sorted(KEPT.glob("*/tables.md")), ids=lambda path: path.parent.name)
def test_the_document_has_the_tables(folder: Path) -> None:
    document = folder.parent.with_suffix(".md").read_text()
    assert with_tables(document, folder.read_text()) == document


def test_errors_are_those_of_means() -> None:
    found = Seeds.of([1.0, 2.0, 3.0])
    assert (found.mean, found.error) == (2.0, pytest.approx(1 / 3**0.5))
    assert Seeds.of([1.0]).text() == "1.0000" and found.text(2) == "2.00 ± 0.58"
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
