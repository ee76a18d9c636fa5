"""The demo's page: whole, self-contained, and saying what the JSON says."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from demo_example import demo_result

from relufy.report.render import render_demo

VOID = {"meta", "br", "use", "path", "rect", "link"}


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    return json.loads(json.dumps(demo_result().to_json()))


@pytest.fixture(scope="module")
def page(demo: dict[str, Any]) -> str:
    return render_demo(demo)


class Balance(HTMLParser):
    """Checks that every element that opens also closes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_elements_are_balanced(page: str) -> None:
    checker = Balance()
    checker.feed(page)
    assert checker.open == []


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    assert not re.findall(r"url\((?!#)", page)
    assert "<script" not in page and "@import" not in page


def test_figures_are_those_of_the_json(page: str, demo: dict[str, Any]) -> None:
    for variant in demo["variants"]:
        assert f"{variant['cost']['bytes_engine'] / 1e6:.2f} MB" in page
        assert f"{variant['bound']:.2f}x" in page
    assert "94.3%" in page and "85.7%" in page
    assert "fits in the cache" in page


def test_generated_text_is_escaped(page: str) -> None:
    assert "&lt;roof&gt; &amp; the old man" in page
    assert "<roof>" not in page


def test_every_drawn_site_is_defined(page: str) -> None:
    for site in ("neuron", "down", "q", "gate"):
        assert f"<dt>{site}</dt>" in page


def test_plots_take_the_page_ink(page: str) -> None:
    assert page.count("<svg") == 6
    assert "currentColor" in page and "#010203" not in page


def test_a_missed_target_is_said(demo: dict[str, Any]) -> None:
    missed = demo | {"targets": [{"name": "stage 1", "target": 0.9, "reached": 0.42, "met": False}]}
    assert "42.0%" in render_demo(missed) and "missed" in render_demo(missed)


def test_real_text_adds_perplexity_and_the_control() -> None:
    result = demo_result()
    estimate = result.variants[1].kl_before
    for variant in result.variants:
        variant.perplexity = variant.perplexity_before = variant.control = estimate
    page = render_demo(json.loads(json.dumps(result.to_json())))
    assert "perplexity, dense control" in page and "perplexity, not fine-tuned" in page


def test_without_text_no_perplexity_is_claimed(page: str) -> None:
    assert "perplexity" not in page
