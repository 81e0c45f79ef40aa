"""`minipeft book` and `minipeft lessons --notebooks`: a small book, its links, its words for figures, and a real browser."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest
from cli_helpers import output

from minipeft.book import links
from minipeft.book.lessons import NEEDED, PACKAGE
from minipeft.book.pictures import describe
from minipeft.book.site import glossary
from minipeft.claims.register import VERDICTS

needs_extra = pytest.mark.skipif(not all(map(find_spec, NEEDED)), reason="needs the extra book")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--allow-file-access-from-files",
    "--enable-logging=stderr", "--window-size=1400,900", "--virtual-time-budget=30000",
)  # fmt: skip
LESSON = """\
# %% [markdown]
# # Lesson 1 · A small one
#
# The engine is `minipeft/autograd/gradcheck.py`, and `lessons/experiments/clipping.py` draws. An equation: $y = W x + \\\\frac{\\\\alpha}{r} B A x$.
#
# $$L = \\\\sum_{t} \\\\log p(x_t \\\\mid x_{<t})$$

# %%
import matplotlib.pyplot as plt

import minipeft as mp
from experiments import clipping

# %%
print("the default rank is", mp.LoraConfig().r, mp.gradcheck.__name__)
draw = clipping.clip_picture

# %%
figure, axes = plt.subplots()
axes.plot([1, 2], [3, 4], label="loss")
axes.set(title="It rises", xlabel="step", ylabel="nats")
figure.savefig("a.png")
"""
README = "| [01 Small](lessons/01_small.py): small | [lora.py](minipeft/peft/lora.py) |\n"
MODULES = ("minipeft.autograd.gradcheck", "minipeft.peft.lora", "experiments.clipping")


def test_a_figure_in_words():
    from matplotlib.figure import Figure

    figure = Figure()
    left, right = figure.subplots(1, 2)
    left.barh(["LoRA", "full"], [1.5, 4], label="MB")
    left.set_title("Memory")
    right.semilogy([1, 2, 3], [1e-3, float("nan"), 1e-5], label="error")
    right.plot([1, 2], [1, 1])
    right.set(xlabel="step", ylabel="error of $h$")
    figure.suptitle("Two things")
    assert describe(figure) == (
        'Figure "Two things" with 2 panels. Panel 1: "Memory"; MB: LoRA is 1.5, full is 4. '
        "Panel 2: error of h (logarithmic) against step; error: 0.001 at 1 to 1e-05 at 3; another line: 1 throughout."
    )


def test_a_line_in_words():
    """Error bars keep their label. A U-curve names its lowest point, and a level its value. Of lines with one label the first is described."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.errorbar([1, 2, 3], [3, 1, 2], [0.1, 0.1, 0.1], capsize=3, label="LoRA")
    axes.errorbar([5, 6, 7], [1, 2, 3], xerr=[1, 1, 1], fmt="o", label="$W_{up}$")
    axes.axhline(2, label="base")
    axes.plot([1, 2, 3], [1, 1.01, 1], label="seed")
    axes.plot([1, 3], [1, 2], label="seed")
    assert describe(axes.figure) == (
        "Figure: LoRA: 3 at 1 to 2 at 3, lowest 1 at 2; W_up: 3 points, from 5 to 7; base: 2 throughout; seed, one of 2: 1 at 1 to 1 at 3; "
        "another line: 1 at 1 to 2 at 3."
    )


def test_what_has_no_label_in_words():
    """Points and bars by the names of their axis, with their error bars; bars of one color together; lines by where they cross; histograms by their shape."""
    from matplotlib.figure import Figure

    figure = Figure()
    points, bars, shapes = figure.subplots(1, 3)
    points.errorbar([0.1, 0.2], [0, 1], xerr=([0.2, 0.1], [0.1, 0.3]), fmt="o", capsize=3)
    points.set_yticks([0, 1], ["full", "LoRA"])
    points.axvline(0)
    points.plot([], [])
    for place, (height, color) in enumerate([(1.5, "C0"), (1250, "C1"), (3, "C0")]):
        bars.bar(place, height, yerr=[[0.5], [1]], color=color, label="tuned" if place == 0 else None)
    bars.set_xticks(range(3), ["a", "b", "c"])
    shapes.stairs([0, 3, 1], [0, 1, 2, 3], fill=True, label="gold")
    shapes.hist([i / 100 + 0.005 for i in range(100)] + [0.5] * 10, bins=20, range=(0, 1))
    shapes.axvline(0.5, label="limit")
    assert describe(figure) == (
        "Figure with 3 panels. Panel 1: points: full is 0.1 [-0.1, 0.2], LoRA is 0.2 [0.1, 0.5]; a line at x = 0. "
        "Panel 2: tuned: a is 1.5 [1, 2.5], c is 3 [2.5, 4]; other bars: b is 1,250 [1,250, 1,251]. "
        "Panel 3: limit: x = 0.5; a histogram, highest at 0.525, nine tenths of it from 0.055 to 0.945; "
        "gold: a histogram, highest at 1.5, nine tenths of it from 1.07 to 2.8."
    )


def test_a_docstring_as_restructured_text():
    text = "First `x` and *y*.\nMore.\n\n    W = A B\n\n1. one\n2. two\n\nr      rank\nalpha  scale"
    assert links.restructured(text.split("\n")) == [
        "First \\ ``x``\\  and \\*y\\*.", "More.", "", "::", "", "        W = A B", "", "", "1. one", "", "2. two", "",
        "::", "", "    r      rank", "    alpha  scale", "",
    ]  # fmt: skip


def test_a_file_has_the_name_by_which_it_is_imported():
    files = {"minipeft/peft/lora.py": "minipeft.peft.lora", "minipeft/accounting/": "minipeft.accounting", "minipeft/nn/__init__.py": "minipeft.nn"}
    files |= {"lessons/experiments/ranks.py": "experiments.ranks", "lessons/experiments/__init__.py": "experiments"}
    assert {file: links.module_name(file) for file in files} == files
    assert {links.file_of(module) for module in files.values()} >= {"peft/lora.py", "lessons/experiments/ranks.py"}


def test_every_verdict_is_in_the_glossary():
    words = {word for entry, _ in glossary() for word in entry.split(", ")}
    assert words >= {*VERDICTS, "as stated", "not told", "equal", "undecided"}


def test_every_lesson_explains_modules_and_uses_what_is_there():
    for path in sorted((PACKAGE.parent / "lessons").glob("[0-9]*.py")):
        assert links.explained(path), path.name
        assert links.used(path), path.name


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A checkout with one small lesson and the experiment that it imports, and a library of two modules and three claims."""
    root = tmp_path_factory.mktemp("project")
    (root / "lessons" / "experiments").mkdir(parents=True)
    for name in ("__init__", "clipping"):
        shutil.copy(PACKAGE.parent / "lessons" / "experiments" / f"{name}.py", root / "lessons" / "experiments")
    (root / "lessons" / "01_small.py").write_text(LESSON.replace("\\\\", "\\"), encoding="utf-8")
    (root / "README.md").write_text(README, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        from minipeft.claims import register

        assert all(map(register.rule_of, ("lora-6", "lora-1", "rlhf-6")))  # loads the rules, which look for their statements
        some = {id: register.statements()[id] for id in ("lora-6", "lora-1", "rlhf-7")}
        here = {name: path for name, path in links.modules().items() if name in MODULES}
        patch.chdir(root)
        patch.setattr(register, "statements", lambda: some)
        patch.setattr(links, "modules", lambda: here)
        yield root


@pytest.fixture(scope="module")
def book(project):
    from minipeft.cli import main

    assert main(["book", "site"]) == 0
    return project / "site"


@pytest.fixture
def site(book):
    """A book as it is: MINIPEFT_BOOK, such as the whole one, or the small one."""
    return Path(os.environ.get("MINIPEFT_BOOK", book))


class Page(HTMLParser):
    """A page's tags with their attributes."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))


def pages_of(site: Path) -> dict[Path, Page]:
    return {path.resolve(): Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}


def broken(site: Path) -> list[str]:
    """The links of a site that lead to no file, or to no anchor of a page; and what would be loaded from elsewhere, by a page or a style."""
    pages, found = pages_of(site), []
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        links = {*re.findall(r"@import\s*[\"']?([^\"';]+)", text), *re.findall(r"url\(\s*[\"']?([^\"')]+)", text)}
        found += [f"{path.name}: {to}" for to in links if not to.startswith(("data:", "#")) and not (path.parent / re.split("[?#]", to)[0]).is_file()]
    anchors = {path: {a["id"] for _, a in page.tags if "id" in a} for path, page in pages.items()}
    for path, page in pages.items():
        for tag, to in {(tag, a.get("href", "") or a.get("src", "")) for tag, a in page.tags}:
            if re.match(r"\w+:|//", to):
                found += [f"{path.name}: {tag} {to}"] if tag != "a" and not to.startswith("data:") else []
            elif to:
                file, _, anchor = to.partition("#")
                target = Path(os.path.normpath(path.parent / unquote(file.partition("?")[0]))) if file else path
                ok = (target in pages or target.is_file()) and (not anchor or target not in anchors or unquote(anchor) in anchors[target])
                found += [] if ok else [f"{path.name}: {to}"]
    return found


@needs_extra
def test_the_book_holds_what_the_lesson_says_and_does(book):
    page = (book / "lessons" / "01_small.html").read_text(encoding="utf-8")
    assert "the default rank is 8 gradcheck" in page and '<math display="block">' in page and "<mfrac>" in page
    picture = re.search(r'<a href="([^"]*)" title="full size"><img[^>]* alt="Figure: &quot;It rises&quot;; nats against step; loss: 3 at 1 to 4 at 2\."', page)
    assert picture and (book / "lessons" / picture[1]).is_file()
    assert page.count("<details") == 2, "preamble and plotting are folded, and nothing else"
    assert "Lesson 1" in (book / "index.html").read_text(encoding="utf-8")


@needs_extra
def test_lessons_and_library_lead_to_each_other(book):
    lesson = (book / "lessons" / "01_small.html").read_text(encoding="utf-8")
    assert "../_modules/minipeft/peft/lora.html#LoraConfig" in lesson and "_modules/minipeft/autograd/gradcheck.html" in lesson
    for page in ("_modules/minipeft/peft/lora.html", "api/minipeft.peft.lora.html"):
        assert "lessons/01_small.html" in (book / page).read_text(encoding="utf-8"), page


@needs_extra
def test_lessons_and_their_experiments_lead_to_each_other(book):
    lesson, index = ((book / page).read_text(encoding="utf-8") for page in ("lessons/01_small.html", "api/index.html"))
    library, _, beside = lesson[lesson.index('id="in-the-library"') :].partition('id="beside-the-lessons"')
    assert "clipping" not in library and "lessons/experiments/clipping.py" in beside
    assert "../_modules/experiments/clipping.html#clip_picture" in beside and "../api/experiments.clipping.html" in beside
    assert '<a href="../_modules/experiments/clipping.html"><code>lessons/experiments/clipping.py</code></a>' in lesson, "in the text"
    assert "experiments.clipping" in index[index.index('id="beside-the-lessons"') :]
    for page in ("_modules/experiments/clipping.html", "api/experiments.clipping.html"):
        assert "lessons/01_small.html" in (book / page).read_text(encoding="utf-8"), page


@needs_extra
def test_every_link_of_the_book_leads_somewhere_and_nothing_is_loaded_from_outside(site):
    assert broken(site) == []


@needs_extra
def test_register_glossary_and_search_are_there(book):
    claims, glossary = ((book / f"{name}.html").read_text(encoding="utf-8") for name in ("claims", "glossary"))
    assert 'id="lora-6"' in claims and "256 times" in claims
    assert "reference policy" in glossary
    assert "pullback" in (book / "searchindex.js").read_text(encoding="utf-8")


@needs_extra
def test_what_has_not_changed_is_not_made_again(book, project, capsys):
    before = {path: path.stat().st_mtime_ns for path in book.rglob("*")}
    assert output(capsys, "book", "site") == (0, f"{Path('site', 'index.html')}: nothing has changed\n", "")
    assert {path: path.stat().st_mtime_ns for path in book.rglob("*")} == before
    status, out, _ = output(capsys, "lessons", "--notebooks", book / "notebooks")
    assert (status, out) == (0, "── lessons: 1 have not changed, 0 run, 0 at a time\n")
    notebook = json.loads((book / "notebooks" / "01_small.ipynb").read_text(encoding="utf-8"))
    assert notebook["cells"][2]["outputs"][0]["text"] == ["the default rank is 8 gradcheck\n"]
    assert sorted(path.name for path in project.iterdir()) == ["README.md", "lessons", "site"], "nothing else was written"
    assert sorted(path.name for path in (project / "lessons").rglob("*")) == ["01_small.py", "__init__.py", "clipping.py", "experiments"]


@needs_extra
def test_a_lesson_that_fails_is_named_and_no_book_is_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "lessons").mkdir()
    (tmp_path / "lessons" / "01_wrong.py").write_text("# %%\nassert 1 > 2, 'one is less'\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for command in (("book", "site"), ("lessons", "--notebooks", "site")):
        status, _, err = output(capsys, *command)
        assert (status, err) == (1, "minipeft: 01_wrong.py failed: AssertionError: one is less\n")
        assert not Path("site").exists(), "something half-written"


@needs_extra
def test_a_notebook_of_mine_is_not_replaced(book, tmp_path, capsys):
    target = tmp_path / "01_small.ipynb"
    edited = json.loads((book / "notebooks" / target.name).read_text(encoding="utf-8"))
    edited["cells"][0]["source"] = "# Mine"
    for mine in ("no notebook", json.dumps(edited)):
        target.write_text(mine, encoding="utf-8")
        status, _, err = output(capsys, "lessons", "--notebooks", tmp_path)
        assert (status, err.count("\n"), target.read_text(encoding="utf-8")) == (2, 1, mine) and "not replaced" in err


@needs_extra
def test_what_is_in_the_way_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "lessons").mkdir()
    (tmp_path / "lessons" / "01_a.py").write_text("# %%\n1\n", encoding="utf-8")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for command, why in {
        ("book", "file"): "is a file", ("lessons", "--notebooks", "file"): "is a file", ("book", "full"): "holds no book",
        ("book", "lessons"): "is the lessons", ("lessons", "--notebooks", "lessons"): "is the lessons",
        ("book", "."): "holds the lessons",
    }.items():  # fmt: skip
        status, out, err = output(capsys, *command)
        assert (status, out, err.count("\n")) == (2, "", 1) and why in err, err
    assert sorted(tmp_path.rglob("*")) == before


def test_without_the_extra_one_sentence_says_what_to_install(tmp_path, monkeypatch, capsys):
    from minipeft.book import lessons

    monkeypatch.setattr(lessons, "find_spec", lambda name: None)
    for command in (("book", tmp_path / "site"), ("lessons", "--notebooks", tmp_path / "site")):
        status, out, err = output(capsys, *command)
        assert (status, out, err.count("\n")) == (2, "", 1) and "pip install 'minipeft[book]'" in err
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ in a browser

# A page of our own holds each page of the book in a frame of a given width, and writes down what it looks like in there.
FRAMES = """<!DOCTYPE html>{frames}<pre id="found"></pre>
<script>
const look = frame => {{
  const page = frame.contentWindow, d = page.document, box = e => e.getBoundingClientRect();
  const scrolls = e => e && (/auto|scroll/.test(page.getComputedStyle(e).overflowX) && e.tagName != "BODY" && e.tagName != "HTML" || scrolls(e.parentElement));
  const rgb = text => text.match(/[\\d.]+/g).map(Number), part = v => v <= 10 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b) + 0.05;  // as WCAG 2 has it
  const background = e => {{ const color = e ? rgb(page.getComputedStyle(e).backgroundColor) : [255, 255, 255]; return color[3] < 1 ? background(e.parentElement) : color; }};
  const contrast = (a, b) => Math.max(a / b, b / a), text = e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim());
  const faint = e => text(e) && contrast(luminance(rgb(page.getComputedStyle(e).color)), luminance(background(e))) < 4.5;
  const cut = e => box(e).width && (box(e).right > page.innerWidth + 0.5 || box(e).left < -0.5) && !scrolls(e);
  return {{
    page: frame.dataset.page, wide: d.documentElement.scrollWidth > page.innerWidth,
    cut: [...d.querySelectorAll("article *, .mobile-header *")].filter(cut).map(e => e.tagName + " " + e.textContent.slice(0, 40)),
    unseen: [...d.images].filter(i => !(i.complete && i.naturalWidth && i.alt)).map(i => i.src),
    outside: page.performance.getEntriesByType("resource").map(r => r.name).filter(r => !r.startsWith("file:") && !r.startsWith("data:")),
    dark: luminance(background(d.body)) < 0.1, faint: [...d.querySelectorAll("article *")].filter(faint).map(e => e.tagName + " " + e.textContent.slice(0, 40)),
    results: [...d.querySelectorAll("#search-results li a")].map(e => e.textContent),
  }};
}};
onload = () => setTimeout(() => found.textContent = "FOUND" + JSON.stringify([...document.querySelectorAll("iframe")].map(look)) + "END", 3000);
</script>"""


def seen(site: Path, pages: list[str], width: int, dark: bool, work: Path) -> list[dict]:
    """What a browser shows of pages of a site, whose addresses are relative to it, to who prefers dark pages or light ones. AssertionError for a complaint."""
    frame = '<iframe data-page="{page}" width="{width}" height="800" style="border: 0" src="{site}/{page}"></iframe>'
    frames = "".join(frame.format(page=page, width=width, site=site.resolve().as_uri()) for page in pages)
    (work / "outer.html").write_text(FRAMES.format(frames=frames), encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--user-data-dir={work / 'profile'}", "--dump-dom", (work / "outer.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(html.unescape(re.search("FOUND(.*)END</pre>", done.stdout)[1]))


@needs_extra
@pytest.mark.skipif(not CHROMIUM, reason="needs chromium on the PATH")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [True, False])
def test_a_browser_shows_every_page_whole_and_readable_and_finds_words(site, tmp_path, width, dark):
    pages = sorted(path.relative_to(site.resolve()).as_posix() for path in pages_of(site))
    for i in range(0, len(pages), 20):
        some = [*pages[i : i + 20], "search.html?q=default+rank"]
        *shown, search = seen(site, some, width, dark, tmp_path)
        for page in shown:
            assert (page["wide"], page["cut"], page["unseen"], page["outside"]) == (False, [], [], []), page
            assert (page["dark"], page["faint"]) == (dark, []), page
        assert any(result.startswith("Lesson") for result in search["results"]), search


@needs_extra
@pytest.mark.skipif(not CHROMIUM, reason="needs chromium on the PATH")
def test_keys_reach_the_search_and_open_what_is_folded(book, tmp_path):
    """Pressed through Chromium's pipes, its descriptors 3 and 4, where a zero byte ends a message; in real time, without the last of FLAGS."""
    (its_input, ours), (theirs, its_output) = os.pipe(), os.pipe()
    page = (book / "lessons" / "01_small.html").resolve().as_uri()
    command = [CHROMIUM, *FLAGS[:-1], "--remote-debugging-pipe", f"--user-data-dir={tmp_path}", page]
    shell = ["bash", "-c", f'exec "$0" "$@" 3<&{its_input} 4>&{its_output}', *command]
    with subprocess.Popen(shell, pass_fds=(its_input, its_output), stderr=subprocess.DEVNULL), open(theirs, "rb") as answers, open(ours, "wb", 0) as calls:
        os.close(its_input), os.close(its_output)

        def call(method, session=None, **params):
            calls.write(json.dumps({"id": 1, "method": method, "params": params, **(session or {})}).encode() + b"\0")
            message = {}
            while "id" not in message:
                text = b""
                while not text.endswith(b"\0"):
                    text += answers.read(1) or pytest.fail("the browser has ended")
                message = json.loads(text[:-1])
            return message.get("result", {})

        def js(expression):
            return call("Runtime.evaluate", session, expression=expression, returnByValue=True).get("result", {}).get("value")

        def press(key, code, text=""):
            for kind in ("keyDown", "keyUp"):
                call("Input.dispatchKeyEvent", session, type=kind, key=key, windowsVirtualKeyCode=code, text=text * (kind == "keyDown"))
            return js("(e => [e.tagName, e.name, e.parentElement.open].join())(document.activeElement)")

        target = next(t["targetId"] for t in call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        session = {"sessionId": call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        while not js("document.readyState == 'complete' && document.links.length > 0"):
            time.sleep(0.05)
        reached = [""]
        while len(reached) < 300 and not reached[-1].startswith("SUMMARY"):
            reached.append(press("Tab", 9))
        assert "INPUT,q," in reached and reached[-1] == "SUMMARY,,false" and press("Enter", 13, "\r") == "SUMMARY,,true"
