"""The demo's arithmetic: shares of KL, bounds, targets."""

import json

import pytest
from demo_example import demo_result

from relufy.demo.result import Estimate


def test_closed_share_compares_with_the_bare_swap() -> None:
    variant = demo_result().variants[1]
    assert variant.kl_closed == pytest.approx(1 - 0.012 / 0.21)


def test_dense_has_no_closed_share() -> None:
    assert demo_result().variants[0].kl_closed is None


def test_bound_is_a_ratio_to_dense() -> None:
    result = demo_result()
    assert result.bound(result.variants[0]) == 1.0
    assert result.bound(result.variants[2]) == pytest.approx(13.77 / 8.8)


@pytest.mark.parametrize(("after", "met"), [(0.020, True), (0.022, False)])
def test_target_is_met_or_not(after: float, met: bool) -> None:
    result = demo_result()
    result.variants[1].kl = Estimate(after, 0.001, 100)
    assert result.targets()[0]["met"] is met


def test_json_holds_what_is_derived() -> None:
    document = json.loads(json.dumps(demo_result().to_json(), allow_nan=False))
    stage1 = document["variants"][1]
    assert stage1["bound"] > 1 and stage1["kl_closed"] > 0.9 and stage1["median_tokens_per_second"] == 1000.0
