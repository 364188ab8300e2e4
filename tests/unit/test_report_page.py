"""The report as a page and as a picture: one file, whatever text is in it, in a real browser."""

import json
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from outlast.errors import ConfigError
from outlast.launcher.commands import report
from outlast.launcher.display import svg
from outlast.launcher.display.page import run_page
from outlast.launcher.display.sweep_page import sweep_page
from outlast.launcher.runs.summary import summarize
from outlast.launcher.runs.sweep_summary import sort_cells, summarize_sweep
from outlast.rundir.directory import RunDirectory

from .runs import end, progress, save, start, sweep_of

EVIL = '<script>alert(1)<!--"><img src=x onerror=alert(1)>'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


def finish(run: RunDirectory, loss: float, cause: str = "finished") -> None:
    ledger = start(run, process_started=time.time() - 5)
    ledger.append("began", 1, step=0, seconds=1.0)
    save(ledger, 40)
    ledger.append("evaluated", 1, step=40, metrics={"eval_loss": loss, "eval_runtime": 0.1})
    end(ledger, cause)
    if cause == "finished":
        ledger.append("finished", 1, step=40, seconds=9.0)
    progress(run, losses=[[step, loss + 1 / step] for step in range(1, 41)], step=40)


@pytest.fixture
def evil(make: Callable[..., RunDirectory]) -> RunDirectory:
    """A run in which every text that others decide is an attack."""
    run = make(EVIL.replace("/", ""))
    ledger = start(run, hosts=[EVIL], job_id=EVIL, process_started=time.time() - 5)
    ledger.append("signal", 1, name=EVIL, step=20, deadline_s=3.0)
    ledger.append("evaluated", 1, step=20, metrics={EVIL: 1.0})
    ledger.append("quarantined", 1, checkpoint=EVIL, reason=EVIL + "\x00\x1b[31m")
    ledger.append("not_saved", 1, objects={EVIL: EVIL})
    ledger.append("data", 1, rows=3, notes=[EVIL])
    ledger.append("attempt_ended", 1, cause=f'x" onload="alert(1) {EVIL}', step=20)
    run.config.write_text(f"trainer: {{metric_for_best_model: '{EVIL}'}}\n")
    progress(run, losses=[[1, 2.0], [2, None], [20, 1.0]])
    return run


class Tags(HTMLParser):
    """What a browser would make of a page: its elements with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def check_harmless(page: str) -> None:
    tags = Tags(page).found
    assert [tag for tag, _ in tags].count("script") == 1
    assert not [tag for tag, _ in tags if tag in ("img", "iframe", "object")]
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert {attributes.get("href") for tag, attributes in tags if tag in ("a", "link")} == {"#report", "data:,"}
    assert not re.search(r"(src|href)=\"?https?:|url\(|@import|fetch\(|XMLHttpRequest", page)


def test_text_of_others_stays_text(evil: RunDirectory, tmp_path: Path) -> None:
    summary = summarize(evil)
    page = run_page(summary)
    check_harmless(page)
    assert page.count("&lt;script&gt;alert(1)") > 8
    assert svg.ticks(-1e308, 1e308, 5) == [-1e308]  # an infinite range
    root = ElementTree.fromstring(svg.standalone([("x" + EVIL, svg.Drawing(9, 9, "x"))]))
    assert EVIL in "".join(root.itertext())
    report.main(evil.path.name, tmp_path, as_json=False, files={"svg": str(tmp_path / "x.svg")})
    names = {element.tag.rpartition("}")[2] for element in ElementTree.parse(tmp_path / "x.svg").iter()}
    assert names <= {"svg", "style", "rect", "g", "text", "line", "path", "circle", "title"}


def test_a_sweeps_text_stays_text_too(tmp_path: Path) -> None:
    path = sweep_of(tmp_path, [])
    manifest = json.loads((path / "sweep.json").read_text())
    for cell, value in zip(manifest["cells"], (EVIL, "b", "c"), strict=True):
        cell |= {"name": f"{cell['name']} {EVIL}", "overrides": [f"{EVIL}={value}", f"seed={cell['index']}"]}
    (path / "sweep.json").write_text(json.dumps(manifest))
    for number in range(3):
        finish(RunDirectory(path / f"seed={number}"), 1.0 + number)
    summary = summarize_sweep(path)
    page = sweep_page(summary, sort_cells(summary, None))
    check_harmless(page)
    assert EVIL in summary["cells"][0]["cell"]


def luminance(colour: str) -> float:
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_contrast_with_what_is_behind_them(theme: int) -> None:
    """By WCAG 2.1, AA: 4.5 for text, 3 for what is drawn."""
    css = (svg.HERE / "report.css").read_text()
    colours = {name: both[theme] for name, *both in re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", css)}

    def contrast(name: str, behind: str) -> float:
        bright, dark = sorted((luminance(colours[name]), luminance(colours[behind])), reverse=True)
        return (bright + 0.05) / (dark + 0.05)

    text = {(name, on): contrast(name, on) for name in ("ink", "soft", "accent", "lost") for on in ("paper", "card")}
    assert {pair: value for pair, value in text.items() if value < 4.5} == {}
    kinds = ("training", "evaluating", "saving", "starting", "stopping", "lost", "queued", "stopped")
    drawn = {name: contrast(name, "card") for name in kinds}
    assert {name: value for name, value in drawn.items() if value < 3} == {}


def in_chromium(page: str, tmp_path: Path, script: str, *, width: int = 1100, dark: bool = False) -> dict[str, Any]:
    """What a script returns that is run when the page has loaded; fails on any message in the console."""
    path = tmp_path / "page.html"
    probe = (
        f"addEventListener('load', () => {{ document.title = 'found:' + JSON.stringify((() => {{{script}}})()); }});"
    )
    path.write_text(page.replace("</body>", f"<script>{probe}</script></body>"))
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"),
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
            *("--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>found:(.*?)</title>", done.stdout)
    assert title, done.stdout[-2000:] + done.stderr
    found: dict[str, Any] = json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return found


@browser
def test_a_run_in_a_browser(evil: RunDirectory, tmp_path: Path) -> None:
    found = in_chromium(
        run_page(summarize(evil)),
        tmp_path,
        """
        const shown = (kind) => [...document.querySelectorAll('svg.' + kind)].map((svg) => svg.getBoundingClientRect());
        const background = () => getComputedStyle(document.body).backgroundColor;
        const before = background();
        document.getElementById('theme').click();
        return {wide: shown('wide').filter((box) => box.width).length,
                narrow: shown('narrow').filter((box) => box.width && box.height > 100).length,
                bars: document.querySelectorAll('svg.narrow rect.starting, svg.narrow rect.stopping').length,
                overflow: document.documentElement.scrollWidth - innerWidth, images: document.images.length,
                before, after: background()};
        """,
        width=500,
        dark=True,
    )
    assert found["wide"] == 0  # on a phone
    assert found["narrow"] >= 2
    assert found["bars"] >= 1
    assert found["overflow"] <= 0
    assert found["images"] == 0
    assert (found["before"], found["after"]) == ("rgb(20, 23, 27)", "rgb(251, 251, 249)")


@pytest.mark.alone
@browser
def test_a_thousand_cells_in_a_browser(tmp_path: Path) -> None:
    """They open and sort within 2 s, and filter."""
    path = sweep_of(tmp_path, [])
    finish(RunDirectory(path / "seed=0"), 1.0)
    finish(RunDirectory(path / "seed=1"), 2.0, "failed")
    summary = summarize_sweep(path)
    first, second, waiting = summary["cells"]
    summary["cells"] = [
        *({**first, "cell": f"a{n}", "metric": {**first["metric"], "value": n * 7 % 500 + 0.5}} for n in range(500)),
        *({**second, "cell": f"b{n}", "metric": {**second["metric"], "value": 1000.0 + n}} for n in range(490)),
        *({**waiting, "cell": f"c{n}"} for n in range(10)),
    ]
    summary["best"] = "a0"
    page = sweep_page(summary, sort_cells(summary, "cell"))
    assert len(page) < 5_000_000
    found = in_chromium(
        page,
        tmp_path,
        """
        const table = document.getElementById('cells'), headers = [...table.tHead.rows[0].cells];
        const column = headers.findIndex((header) => header.textContent === 'eval_loss');
        const values = () => [...table.tBodies[0].rows].map((row) => row.cells[column].textContent);
        const best = table.querySelector('tr.best').cells[0].textContent;
        headers[column].firstElementChild.click();
        document.body.getBoundingClientRect();
        const seconds = performance.now() / 1000;
        const up = values(), sort = headers[column].getAttribute('aria-sort');
        headers[column].firstElementChild.click();
        const down = values();
        const filter = document.getElementById('filter');
        filter.value = 'state:failed b1';
        filter.dispatchEvent(new Event('input'));
        const left = [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
        return {best, seconds, up, sort, down, left, count: document.getElementById('count').textContent};
        """,
    )
    known = [f"{value:.4g}" for value in sorted(c["metric"]["value"] for c in summary["cells"] if c["metric"])]
    assert found["best"] == "a0"
    assert found["up"] == known + [""] * 10
    assert found["down"] == known[::-1] + [""] * 10
    assert found["sort"] == "ascending"
    assert len(found["left"]) == 1 + 10 + 100
    assert all(name.startswith("b1") for name in found["left"])
    assert found["count"] == "111 of 1000"
    assert found["seconds"] < 2.0


def test_the_files_of_the_command(
    make: Callable[..., RunDirectory],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    finish(make("one"), 1.0)
    monkeypatch.chdir(tmp_path)
    files = {"html": "", "svg": "plots.svg", "png": str(tmp_path / "plots.png")}
    assert report.main("one", tmp_path, as_json=False, files=files) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["one.html", "plots.svg", files["png"]]
    assert (tmp_path / "one.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "plots.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    width = int.from_bytes((tmp_path / "plots.png").read_bytes()[16:20], "big")
    assert width == 2 * svg.WIDE
    with pytest.raises(ConfigError, match=r"--svg: 'no/x.svg' is refused; valid: a file, in a directory that is there"):
        report.main("one", tmp_path, as_json=False, files={"svg": "no/x.svg"})
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ConfigError, match=r"--png: .* it needs the package resvg-py: pip install 'outlast\[plot\]'"):
        report.main("one", tmp_path, as_json=False, files={"png": ""})


def test_a_page_of_a_run_that_has_shown_nothing_yet(make: Callable[..., RunDirectory]) -> None:
    """Not a loss, or only such as are no numbers; many hosts, many attempts with evaluations in each."""
    run = make("one")
    start(run, hosts=[f"n{number}" for number in range(500)])
    assert "Attempts" in run_page(summarize(run))
    progress(run, losses=[[1, None], [2, None]])
    page = run_page(summarize(run))
    assert "Loss" not in page
    assert "n5, and 494 more" in page
    began = time.time() - 80_000
    with open(run.ledger, "w") as file:
        for attempt in range(1, 201):
            at = began + 300 * attempt
            fields = {"job_id": "1", "restart_count": 0, "hosts": ["n"], "world_size": 8, "versions": {}}
            lines: list[tuple[float, str, dict[str, Any]]] = [(at, "attempt_started", fields)]
            lines += [
                (at + 2 * n, "evaluated", {"step": n, "metrics": {"eval_loss": 1.0, "eval_runtime": 1.0}})
                for n in range(1, 101)
            ]
            for moment, event, fields in [*lines, (at + 280, "attempt_ended", {"cause": "preempted", "step": 100})]:
                file.write(json.dumps({"time": moment, "attempt": attempt, "event": event, **fields}) + "\n")
    assert len(run_page(summarize(run))) < 2_000_000


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [(0.0, 1.0, [0, 0.25, 0.5, 0.75, 1.0]), (1.2, 3.9, [2, 3]), (5.0, 5.0, [5.0]), (0.0, 8e9, [0, 2e9, 4e9, 6e9, 8e9])],
)
def test_axes_have_round_values(low: float, high: float, found: list[float]) -> None:
    assert svg.ticks(low, high, 4) == pytest.approx(found)
