"""An object in a process of its own, called by JSON lines over pipes.

Each contender of a benchmark lives in one, so that none shares the threads or the peak memory of another, and
one that is not called sleeps in a read.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any

from relufy.errors import UserError


class Worker:
    """Makes `module:Class` with the arguments in a new process; `call` runs its methods. Use as `with`.

    Arguments and results are plain data. Raises UserError with the other side's words if it fails.
    """

    def __init__(self, target: str, **arguments: Any):
        self._target = target
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "relufy.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self._ask({"target": target, "arguments": arguments})
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, method: str, **arguments: Any) -> Any:
        """Run a method over there and return what it returns."""
        return self._ask({"method": method, "arguments": arguments})

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin and self._process.stdout
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, message: dict[str, Any]) -> Any:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UserError(f"the process of {self._target} ended: {self._last_words()}")
        answer = json.loads(line)
        if "missing" in answer:
            raise ModuleNotFoundError(answer["error"], name=answer["missing"])
        if "error" in answer:
            raise UserError(answer["error"])
        return answer["result"]

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.wait()}"


def serve() -> None:
    """Answer the calls of a Worker until its end of the pipe closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not reach the pipe
    served: Any = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if "target" in message:
                module, _, name = message["target"].partition(":")
                served, result = getattr(importlib.import_module(module), name)(**message["arguments"]), None
            else:
                result = getattr(served, message["method"])(**message["arguments"])
            answer = {"result": result}
        except UserError as error:
            answer = {"error": str(error)}
        except ModuleNotFoundError as error:
            answer = {"error": str(error), "missing": error.name}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
