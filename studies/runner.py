"""Runs the jobs of studies side by side on one machine, and goes on where it stopped.

    python -m studies.runner WORK recovery prosparse --workers 8

A study's plan may depend on what is done: it is asked again after every job.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from studies.job import Job


def finished(work: Path) -> dict[str, dict[str, Any]]:
    """Return the results that there are, by the name of their job."""
    return {path.stem: json.loads(path.read_text()) for path in (work / "results").glob("*.json")}


def run_all(work: Path, studies: list[str], workers: int, scale: float) -> None:
    """Run every job of the studies' plans; a job that failed is not tried again, and said."""
    for name in ("results", "models", "jobs", "logs"):
        (work / name).mkdir(parents=True, exist_ok=True)
    modules = [import_module(f"studies.{study}") for study in studies]
    done = finished(work)
    running: dict[str, tuple[subprocess.Popen, float]] = {}
    failed: set[str] = set()
    while True:
        planned = {job.name: job for module in modules for job in module.plan(done)}
        waiting = [
            job
            for job in planned.values()
            if job.name not in done
            and job.name not in running
            and job.name not in failed
            and all(need in done for need in job.needs())
        ]
        for job in waiting[: workers - len(running)]:
            running[job.name] = (_start(_scaled(job, scale), work), time.monotonic())
        if not running:
            break
        time.sleep(0.2)
        for name, (process, started) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            if process.returncode == 0:
                done[name] = json.loads((work / "results" / f"{name}.json").read_text())
                nats = done[name]["final"]["nats"]
                print(f"{name}: {time.monotonic() - started:.0f} s, {nats:.4f} nats", flush=True)
            else:
                failed.add(name)
                print(f"{name}: FAILED, see {work / 'logs' / f'{name}.txt'}", flush=True)
    print(f"{len(done)} done, {len(failed)} failed", flush=True)


def _scaled(job: Job, scale: float) -> Job:
    """Return the job with fewer and smaller steps, for trying a plan out."""
    if scale == 1:
        return job
    settings = dict(job.finetune)
    settings["steps"] = max(4, int(settings["steps"] * scale))
    settings["batch_size"] = 8
    settings["log_steps"] = 1
    settings["warmup_steps"] = min(settings.get("warmup_steps", 10), settings["steps"] // 2)
    return dataclasses.replace(job, finetune=settings)


def _start(job: Job, work: Path) -> subprocess.Popen:
    description = work / "jobs" / f"{job.name}.json"
    description.write_text(json.dumps(dataclasses.asdict(job), indent=1))
    log = (work / "logs" / f"{job.name}.txt").open("w")
    command = [sys.executable, "-m", "studies.job", str(description), str(work)]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def main() -> None:
    """Run the studies named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("studies", nargs="+")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="do this share of the steps, to try it out")
    options = parser.parse_args()
    run_all(options.work, options.studies, options.workers, options.scale)


if __name__ == "__main__":
    main()
