"""The page in a real browser, where there is one: it fits a phone, and says nothing on the console."""

import shutil
import subprocess
from html import escape
from pathlib import Path

import documents
import pytest

from relufy.report.report import make_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += [
    "--disable-background-networking",
    "--disable-component-update",
    "--enable-logging=stderr",
    "--hide-scrollbars",
]
PROBE = """
<iframe id=page style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe><p id=found></p>
<script>
const frame = document.getElementById("page");
window.onload = () => {{
  const root = frame.contentDocument.documentElement;
  const plots = [...frame.contentDocument.querySelectorAll("figure:not(.wide) svg")];
  const outside = plots.filter(p => p.getBoundingClientRect().right > {width} + 1).length;
  const words = ["width", root.scrollWidth, "plots", plots.length, "outside", outside];
  document.getElementById("found").textContent = words.join(" ");
}};
</script>
"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    report = make_report(documents.write_all(folder))
    report.write(folder / "r.html")
    return (folder / "r.html").read_text()


def browse(address: str, profile: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *more, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_overflows_and_the_console_is_silent(page: str, width: int, tmp_path: Path) -> None:
    probe = tmp_path / "probe.html"
    probe.write_text("<!doctype html>" + PROBE.format(page=escape(page, quote=True), width=width))
    found = browse(probe.as_uri(), tmp_path / "profile", "--dump-dom")
    assert f"width {width} plots" in found.stdout, found.stdout[-300:]
    assert "outside 0<" in found.stdout
    assert "CONSOLE" not in found.stderr, found.stderr


def test_a_forbidden_request_would_be_seen(page: str, tmp_path: Path) -> None:
    """The page's own policy turns any request into a message on the console, so silence means none."""
    broken = tmp_path / "broken.html"
    broken.write_text(page.replace("</main>", '<img src="file:///nowhere.png"></main>'))
    found = browse(broken.as_uri(), tmp_path / "profile", "--dump-dom")
    assert "CONSOLE" in found.stderr and "Content Security Policy" in found.stderr


def test_it_prints(page: str, tmp_path: Path) -> None:
    (tmp_path / "r.html").write_text(page)
    browse((tmp_path / "r.html").as_uri(), tmp_path / "profile", f"--print-to-pdf={tmp_path / 'r.pdf'}")
    assert (tmp_path / "r.pdf").read_bytes().startswith(b"%PDF")
