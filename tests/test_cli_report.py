"""The report of `minipeft compare`: one file that holds everything, right in its numbers, and whole in a real browser."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from minipeft.cli import page
from minipeft.cli.report import Sample

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--allow-file-access-from-files",
    "--enable-logging=stderr", "--window-size=1400,900",
)  # fmt: skip

SETTINGS = {
    "data": "my <own> & only.jsonl", "model": "the shipped base", "steps": 8, "batch_size": 4, "seed": 0, "seeds": 3,
    "reduced": False, "held_out_examples": 7, "max_length": 64, "left_out": {"bitfit": "this model has no biases"},
}  # fmt: skip


def row(method, title, task_loss, forgotten, storage, **more):
    seeds = [
        {"seed": i, "score": 10 * (5 - task_loss), "task_loss": task_loss + d, "general_loss": 3 + forgotten, "forgotten": forgotten, "seconds_per_step": 0.1}
        for i, d in enumerate((-0.01, 0.0, 0.01))
    ]
    return {
        "method": method, "title": title, "learning_rate": 1e-3, "trainable": storage // 4, "parameters": 1_000_000,
        "memory_predicted": 40_000_000 + storage, "memory_measured": 41_000_000 + storage, "seconds_per_step": 0.1,
        "storage": storage, "latency": 0.002, "latency_merged": 0.001, "task_loss": task_loss, "general_loss": 3 + forgotten,
        "scored": "chrF", "score": 10 * (5 - task_loss), "forgotten": forgotten, "curve": [[i, 4 - i / 10] for i in range(1, 9)], "held_out_curve": [[4, 3.2], [8, task_loss]],
        "seeds": seeds, **more,
    }  # fmt: skip


ROWS = [
    row("frozen", "frozen", 3.5, 0.0, 0, seconds_per_step=None, curve=[], held_out_curve=[], seeds=[]),
    row("full", "full", 2.5, 0.6, 4_000_000),
    row("lora", "LoRA r=8", 2.51, 0.2, 400_000),
    row("prompt", "prompt <P=20>", 3.3, 0.05, 10_000, latency_merged=None),
]
SHOWN = [Sample("a", "<b>Word</b>: a-very-long-word-" * 9, "right & proper", {"frozen": "x" * 300, "full": "ok"})]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "index.html"
    page.write_page(path, SETTINGS, ROWS, SHOWN)
    return path


class Outline(HTMLParser):
    """Tags with their attributes, and the text of each table cell and list item."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th", "li"):
            self.open.append(tag)
            self.cells.append("")

    def handle_endtag(self, tag):
        if self.open and tag == self.open[-1]:
            self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.cells[-1] += data


def test_the_page_refers_to_nothing_outside_itself(path):
    text = path.read_text(encoding="utf-8")
    references = [v for _, attrs in Outline(text).tags for k, v in attrs.items() if k in ("src", "srcset", "href")]
    assert references and all(reference.startswith("data:") for reference in references)
    svgs = [base64.b64decode(r.partition("base64,")[2]) for r in references if "svg" in r]
    assert len(svgs) == 3
    assert not any(re.search(rb"(href|src)=\"(?!#)", svg) for svg in svgs), "a picture refers to another file"
    assert "<script" not in text and "url(" not in text and "@import" not in text


def test_the_page_is_accessible(path):
    tags = Outline(path.read_text(encoding="utf-8")).tags
    assert dict(tags)["html"] == {"lang": "en"}
    assert [tag for tag, _ in tags if re.fullmatch("h[1-6]", tag)][:2] == ["h1", "h2"]
    assert all(len(attrs.get("alt", "")) > 40 for tag, attrs in tags if tag == "img")
    assert all("scope" in attrs for tag, attrs in tags if tag == "th")
    regions = [attrs for _, attrs in tags if attrs.get("role") == "region"]
    assert regions and all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in regions)
    assert "viewport" in [attrs.get("name") for tag, attrs in tags if tag == "meta"]


def test_the_numbers_are_those_of_the_rows(path):
    text = path.read_text(encoding="utf-8")
    cells = Outline(text).cells
    at = cells.index("LoRA r=8")
    assert cells[at + 1 : at + 13] == [
        "2.510 ± 0.010", "24.9", "+0.200 ± 0.000", "3.200", "100,000", "10.00", "400 kB", "41.4 MB", "40.4 MB", "0.100", "2.00", "1.00",
    ]  # fmt: skip
    assert cells[cells.index("prompt <P=20>") + 12] == "no"  # it cannot be merged
    assert "&lt;own&gt; &amp; only" in text and "<own>" not in text and "<b>Word" not in text


def test_the_conclusions_follow_from_the_rows():
    lines = page.conclusions(ROWS)
    assert lines[0] == "full learned most: it brought the base's task loss of 3.500 down to 2.500 ± 0.010."
    assert "LoRA r=8 comes as close as the seeds can distinguish" in lines[1]
    assert "LoRA r=8 forgot least: +0.200 on general text, full +0.600" in lines[2]
    apart = [ROWS[0], ROWS[1], row("lora", "LoRA r=8", 2.6, 0.7, 400_000)]
    assert not any("as close" in line for line in page.conclusions(apart))
    assert "full forgot least" in " ".join(page.conclusions(apart))
    worse = [ROWS[0], row("full", "full", 4.0, 1.0, 4)]
    assert page.conclusions(worse) == ["No method got below the base's task loss of 3.500: more steps or another learning rate are needed."]


def test_the_same_rows_give_the_same_bytes(path, tmp_path):
    page.write_page(tmp_path / "again.html", SETTINGS, ROWS, SHOWN)
    assert (tmp_path / "again.html").read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.html"]


# ------------------------------------------------------------------------------------------------------ in a browser


# A page of our own holds the report in a frame of a given width, and writes down what it looks like in there.
FRAME = """<!DOCTYPE html>
<iframe id="frame" width="{width}" height="800" style="border: 0" src="{url}"></iframe><pre id="found"></pre>
<script>onload = () => {{
  const page = frame.contentWindow, d = page.document, outside = e => !e.parentElement.closest(".scroll");
  const box = e => e.getBoundingClientRect(), cut = e => box(e).right > page.innerWidth + 0.5 || box(e).left < 0;
  found.textContent = "FOUND" + JSON.stringify({{
    mode: d.compatMode, width: page.innerWidth, wide: d.documentElement.scrollWidth > page.innerWidth,
    table: d.querySelector(".scroll").clientWidth <= page.innerWidth,
    cut: [...d.querySelectorAll("main *")].filter(e => outside(e) && cut(e)).map(e => e.tagName),
    images: [...d.images].map(i => i.complete && i.naturalWidth > 0),
    loaded: page.performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:")).map(r => r.name),
  }}) + "END";
}}</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium on the PATH")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it_whole_and_without_complaint(path, tmp_path, width):
    outer = tmp_path / "outer.html"
    outer.write_text(FRAME.format(width=width, url=path.as_uri()), encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", outer.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(html.unescape(re.search("FOUND(.*)END</pre>", done.stdout)[1]))
    right = {"mode": "CSS1Compat", "width": width, "wide": False, "table": True, "cut": [], "images": [True] * 3, "loaded": []}
    assert found == right
    assert "CONSOLE" not in done.stderr, done.stderr
