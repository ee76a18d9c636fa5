"""`relufy report`: every kind of result is read, what is none is refused by name, and nothing is loaded."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import documents
import pytest

from relufy.cli.main import run
from relufy.errors import UserError
from relufy.report.report import make_report
from relufy.report.run import READERS, read_run

VOID = {"meta", "br", "use", "path", "rect", "link"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return documents.write_all(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def pages(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("report")
    outputs = [word for name in ("r.html", "r.md") for word in ("-o", str(folder / name))]
    assert run(["report", *map(str, files), *outputs]) == 0
    return {name: (folder / name).read_text() for name in ("r.html", "r.md")}


class Outline(HTMLParser):
    """Checks that elements close, and gathers ids and what is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loaded: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [found["id"]] if found.get("id") else []
        for name in ("src", "href", "xlink:href", "srcset", "poster", "data"):
            value = found.get(name)
            if value and value.startswith("#"):
                self.targets.append(value[1:])
            elif value:
                self.loaded.append(value)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def outline(pages: dict[str, str]) -> Outline:
    found = Outline()
    found.feed(pages["r.html"])
    return found


def test_the_page_is_whole_and_loads_nothing(pages: dict[str, str], outline: Outline) -> None:
    assert outline.open == [] and outline.loaded == []
    assert not re.findall(r"url\((?!#)", pages["r.html"])
    assert "<script" not in pages["r.html"] and "@import" not in pages["r.html"]
    assert "default-src 'none'" in pages["r.html"]


def test_ids_are_the_pages_own_and_links_lead_somewhere(outline: Outline) -> None:
    assert len(outline.ids) == len(set(outline.ids))
    assert set(outline.targets) <= set(outline.ids)


def test_every_plot_has_words_for_those_who_cannot_see_it(pages: dict[str, str]) -> None:
    plots = re.findall(r"<svg.*?</svg>", pages["r.html"], flags=re.DOTALL)
    assert len(plots) >= 14
    for plot in plots:
        label = re.search(r'aria-labelledby="(\S+) (\S+)"', plot)
        assert label and f'<title id="{label[1]}">' in plot and f'<desc id="{label[2]}">' in plot


def test_every_kind_has_its_section(pages: dict[str, str]) -> None:
    for title in (
        "Measured: folder/my-model",
        "Over time",
        "Training-free",
        "Evaluated",
        "Benchmark",
        "Doctor",
    ):
        assert title in pages["r.html"] and title in pages["r.md"]
    assert "Training: run" in pages["r.html"]


def test_both_forms_have_the_same_figures(pages: dict[str, str]) -> None:
    for figure in ("40.25 ± 0.40", "2.00x", "54.8", "Layer 1 is dead", "no difference seen", "31.0 %"):
        assert figure in pages["r.html"] and figure in pages["r.md"]


def test_commands_and_versions_are_there_and_escaped(pages: dict[str, str]) -> None:
    assert "relufy relufy.measure &lt;x&gt; &amp; y" in pages["r.html"]
    assert "a note with &lt;angles&gt;" in pages["r.html"] and "relufy 0.1.0" in pages["r.html"]


def test_the_same_results_give_the_same_page(
    files: list[Path], tmp_path: Path, pages: dict[str, str]
) -> None:
    make_report(files).write(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == pages["r.html"]


def test_several_measurements_stand_side_by_side(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(documents.measure() | {"model": name}))
    overview = make_report([tmp_path / "a.json", tmp_path / "b.json"]).overview
    assert [row[0] for row in overview[0].rows] == ["a", "b"]


def test_many_layers_are_drawn_wide(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps(documents.measure(layers=40)))
    (section,) = make_report([tmp_path / "m.json"]).sections
    assert section.figures[0].wide and not section.figures[-1].wide


def test_a_document_without_extras_is_read(tmp_path: Path) -> None:
    lean = documents.measure()
    for key in ("sites", "neurons", "unions", "hidden", "preactivations", "bytes_engine"):
        del lean[key]
    (tmp_path / "m.json").write_text(json.dumps(lean))
    (section,) = make_report([tmp_path / "m.json"]).sections
    assert [figure.title for figure in section.figures] == ["Zeros by layer and site"]


REFUSED = {
    "nothing.json": None,
    "text.json": "no JSON",
    "list.json": "[1, 2]",
    "other.json": '{"kind": "something"}',
    "unknown.json": '{"kind": "relufy.unknown", "a": 1}',
    "damaged.json": '{"kind": "relufy.measure", "model": "m"}',
    "cut.json": '{"kind": "relufy.compare", "rows": [{"method"',
    "log.jsonl": '{"loss": 1}\n',
    "empty.jsonl": "",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_result_is_refused_by_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if REFUSED[name] is not None:
        (tmp_path / name).write_text(REFUSED[name] or "")
    assert run(["report", str(tmp_path / name), "-o", str(tmp_path / "r.html")]) == 2
    error = capsys.readouterr().err
    assert name in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("kind", ["measure", "overtime", "reuse", "compare", "evaluation", "bench", "doctor"])
def test_every_missing_part_is_a_refusal_not_a_crash(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("svg", "lines", "sections.histograms", "sections.evaluation", "sections.bench"):
        monkeypatch.setattr(f"relufy.report.{place}.draw", lambda *_args, **_kwargs: "<svg></svg>")
    whole = getattr(documents, kind)()
    path = tmp_path / "part.json"
    for key in set(whole) - {"kind"}:
        path.write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        try:
            make_report([path])
        except UserError as error:
            assert "part.json" in str(error)


def test_other_formats_are_refused(files: list[Path], tmp_path: Path) -> None:
    assert run(["report", str(files[0]), "-o", str(tmp_path / "r.pdf")]) == 2


def test_kinds_of_later_versions_are_read_by_their_family(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(
        json.dumps(documents.overtime() | {"kind": "relufy.measure.overtime.new"})
    )
    assert read_run(tmp_path / "m.json").kind == "relufy.measure.overtime.new"
    assert make_report([tmp_path / "m.json"]).sections[0].title == "Over time: my-model"
    assert all(kind.startswith("relufy.") for kind in READERS)
