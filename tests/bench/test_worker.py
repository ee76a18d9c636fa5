"""Objects in processes of their own: calls come back, mistakes come back as errors."""

import pytest

from relufy.bench.worker import Worker
from relufy.errors import UserError


def test_calls() -> None:
    with Worker("collections:Counter", a=1, b=3) as worker:
        assert worker.call("most_common", n=1) == [["b", 3]]
        assert worker.call("total") == 4


def test_errors_of_the_user_come_back() -> None:
    with pytest.raises(UserError, match="there is no shape 'huge'"):
        Worker("relufy.bench.shapes:find_shape", name="huge")


def test_missing_packages_come_back_by_name() -> None:
    with pytest.raises(ModuleNotFoundError) as caught:
        Worker("no_such_package:Thing")
    assert caught.value.name == "no_such_package"


def test_a_crash_is_told_with_its_last_words() -> None:
    with (
        Worker("collections:Counter") as worker,
        pytest.raises(UserError, match=r"process of collections:Counter ended: AttributeError.*nonsense"),
    ):
        worker.call("nonsense")


def test_what_libraries_print_does_not_disturb() -> None:
    with Worker("builtins:print", end="noise", flush=True) as worker:
        assert worker.pid > 0
