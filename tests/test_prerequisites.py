"""What a missing prerequisite of `make` says: one line with what to install."""

import os
import subprocess

import pytest

from conftest import REPOSITORY

SCRIPT = REPOSITORY / ".ci" / "prerequisites"


def check(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT)], env=os.environ | environment, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PYTHON": "no-such-python"}, "Python 3.11 or newer (no-such-python: found none): apt install"),
        ({"CXX": "no-such-compiler"}, "C++20 compiler (no-such-compiler not found): apt install g++"),
        ({"CXX": "false"}, "C++20 compiler (false is too old or broken)"),
    ],
)
def test_missing_prerequisite_is_one_line(environment: dict[str, str], said: str) -> None:
    done = check(**environment)
    assert done.returncode == 1 and done.stdout == ""
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_old_python_names_its_version(tmp_path: os.PathLike[str]) -> None:
    old = os.path.join(tmp_path, "python-old")
    with open(old, "w") as file:
        file.write('#!/bin/sh\ncase "$2" in *version_info*) exit 1;; *) echo 3.9.1;; esac\n')
    os.chmod(old, 0o755)
    assert f"({old}: found 3.9.1)" in check(PYTHON=old).stderr
