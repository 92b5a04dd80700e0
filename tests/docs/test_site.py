"""The site: built strictly, complete, without a network, and as a reader meets it in a browser."""

from __future__ import annotations

import functools
import html
import http.server
import importlib
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from retinaray.cli import EXIT_CODES, VERBS
from retinaray.config.help_text import format_help
from retinaray.config.options import Option, OptionTable

# What a browser fetches by itself; a link waits for a reader.
FETCHED = {
    *(("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src")),
    *(("link", "href"), ("object", "data"), ("embed", "src"), ("img", "srcset")),
}


class AssetReader(HTMLParser):
    """Collects what a page makes a browser fetch, and the words that are shown."""

    def __init__(self) -> None:
        super().__init__()
        self.assets: list[str] = []
        self.classes: set[str] = set()
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "link" and values.get("rel") in ("canonical", "prev", "next"):
            return
        self.assets += [value for name, value in values.items() if (tag, name) in FETCHED]
        self.classes |= set(values.get("class", "").split())

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read_html(path: Path) -> AssetReader:
    reader = AssetReader()
    reader.feed(path.read_text("utf-8"))
    return reader


def show(path: Path) -> str:
    """The text of a page, its blanks evened out."""
    return " ".join("".join(read_html(path).words).split())


@pytest.fixture(scope="session")
def build_site(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Build a site: build_site(target, root=..., strict=...)."""
    pytest.importorskip("material", reason="needs mkdocs-material, which is not installed")

    def build(
        target: Path, root: Path = repository, *, strict: bool = True
    ) -> subprocess.CompletedProcess[str]:
        arguments = ["-m", "mkdocs", "build", "--site-dir", str(target)]
        arguments += ["--strict"] if strict else []
        environment = {
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(repository / "platform"),
            "NO_MKDOCS_2_WARNING": "1",
        }
        return subprocess.run(
            [sys.executable, *arguments, "--config-file", str(root / "mkdocs.yml")],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return build


@pytest.fixture(scope="session")
def built(
    build_site: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:
    """The site of this checkout, and what was said while it was built."""
    folder = tmp_path_factory.mktemp("site")
    # A strict build writes nothing when there is a warning: one fault would hide all others.
    answer = build_site(folder, strict=False)
    assert answer.returncode == 0, answer.stderr
    return folder, answer.stdout + answer.stderr


@pytest.fixture
def site(built: tuple[Path, str]) -> Path:
    """The folder of the site of this checkout."""
    return built[0]


@pytest.fixture
def checkout(tmp_path: Path, repository: Path) -> Path:
    """A copy of what a site is made from, to damage."""
    root = tmp_path / "checkout"
    shutil.copytree(repository / "docs", root / "docs")
    for name in ("mkdocs.yml", "README.md", "CHANGELOG.md", "DECISIONS.md"):
        shutil.copy(repository / name, root / name)
    (root / "cluster").mkdir()
    shutil.copy(repository / "cluster" / "README.md", root / "cluster" / "README.md")
    for name in ("jobs", "platform"):
        (root / name).symlink_to(repository / name, target_is_directory=True)
    return root


def test_build_warns_of_nothing(built: tuple[Path, str]) -> None:
    warnings = [line for line in built[1].splitlines() if not line.startswith("INFO")]
    assert [line for line in warnings if line.strip()] == []


def test_site_holds_every_page_of_the_sources(site: Path, repository: Path) -> None:
    docs = repository / "docs"
    pages = [path.relative_to(docs).with_suffix("") for path in docs.rglob("*.md")]
    assert len(pages) > 20
    missing = [
        str(page)
        for page in pages
        if not (site / (page.parent if page.name == "index" else page) / "index.html").is_file()
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("page", "text", "complaint"),
    [
        ("index.md", "\n[gone](how_to/absent.md)\n", "contains a link 'how_to/absent.md'"),
        ("index.md", "\n[gone](#absent)\n", "contains a link '#absent'"),
        ("index.md", "\n[gone](../absent.yaml)\n", "'../absent.yaml'"),
        ("stray.md", "# Stray\n", 'not included in the "nav" configuration'),
    ],
    ids=["page", "anchor", "file", "navigation"],
)
@pytest.mark.slow
def test_build_fails_when_a_page_or_a_link_is_lost(
    build_site: Callable[..., subprocess.CompletedProcess[str]],
    checkout: Path,
    tmp_path: Path,
    page: str,
    text: str,
    complaint: str,
) -> None:
    with (checkout / "docs" / page).open("a", encoding="utf-8") as stream:
        stream.write(text)
    answer = build_site(tmp_path / "out", checkout)
    assert answer.returncode != 0
    assert complaint in answer.stdout + answer.stderr


def test_links_to_the_repository_lead_to_copies(
    build_site: Callable[..., subprocess.CompletedProcess[str]], checkout: Path, tmp_path: Path
) -> None:
    with (checkout / "docs" / "index.md").open("a", encoding="utf-8") as stream:
        stream.write("\n[settings](../jobs/train.py) [cluster](../cluster/README.md#stop)\n")
    answer = build_site(tmp_path / "out", checkout)
    assert answer.returncode == 0, answer.stderr
    text = (tmp_path / "out" / "index.html").read_text("utf-8")
    assert 'href="repository/jobs/train.py"' in text
    assert 'href="cluster/#stop"' in text
    copy = tmp_path / "out" / "repository" / "jobs" / "train.py"
    assert copy.read_bytes() == (checkout / "jobs" / "train.py").read_bytes()


def load_table(verb: str) -> OptionTable:
    module, _, name = VERBS[verb].job.partition(":")
    return OptionTable(vars(importlib.import_module(module))[name])


def list_words(option: Option) -> list[str]:
    """What a reference has to say of a setting."""
    flag = option.flag.name if option.flag is not None and not option.is_positional else ""
    unit = option.flag.unit if option.flag is not None else ""
    choices = list(option.shape.choices)
    bounds = [option.shape.bounds.strip()] if option.shape.bounds else []
    return [word for word in (flag, option.key, unit, *choices, *bounds) if word]


@pytest.mark.parametrize("verb", list(VERBS))
def test_reference_has_every_option_of_the_command(site: Path, verb: str) -> None:
    table = load_table(verb)
    text = show(site / "reference" / "commands" / verb / "index.html")
    rows = (site / "reference" / "commands" / verb / "index.html").read_text("utf-8")
    assert rows.count("<code>") > len(table.options)
    missing = [
        (option.key, word)
        for option in table.options
        for word in [*list_words(option), " ".join(option.help.replace("`", "").split())]
        if word not in text
    ]
    assert missing == []


@pytest.mark.parametrize("verb", list(VERBS))
def test_reference_has_the_options_that_every_command_has(site: Path, verb: str) -> None:
    module, _, name = VERBS[verb].job.partition(":")
    job_class = vars(importlib.import_module(module))[name]
    common = format_help(job_class, load_table(verb)).partition("Every command")[2]
    options = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", common.partition("\nEvery setting")[0]))
    assert "--print-config" in options
    text = show(site / "reference" / "index.html")
    assert [option for option in sorted(options) if option not in text] == []


def test_reference_has_the_exit_codes(site: Path) -> None:
    text = show(site / "reference" / "exit_codes" / "index.html")
    assert " ".join(EXIT_CODES.split()) in text
    assert re.search(r"ConfigError\s*2\s", text)
    assert re.search(r"ClusterError\s*1\s", text)


def test_reference_says_something_of_every_key(site: Path) -> None:
    text = (site / "reference" / "json_line" / "index.html").read_text("utf-8")
    rows = re.findall(r"<tr>\s*<td>(.*?)</td>\s*<td>(.*?)</td>\s*</tr>", text, re.DOTALL)
    assert len(rows) > 80
    assert [key for key, meaning in rows if not meaning.strip()] == []


def test_reference_follows_an_outcome_to_what_it_is_made_of(
    list_keys: Callable[[str], set[str]],
) -> None:
    assert {"passed", "rows", "job", "report"} <= list_keys("parity")
    assert {"AP", "classes", "job"} <= list_keys("evaluate")


def test_pages_fetch_nothing_from_a_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    found = [
        (str(page.relative_to(site)), asset)
        for page in pages
        for asset in read_html(page).assets
        if re.match(r"(\w+:)?//", asset)
    ]
    assert found == []
    # The theme's script would fetch a library for these.
    assert [str(page) for page in pages if "mermaid" in read_html(page).classes] == []
    sheets = list(site.rglob("*.css"))
    assert sheets
    imports = [
        address
        for sheet in sheets
        for address in re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')]+)", sheet.read_text("utf-8"))
        if re.match(r"(https?:)?//", address)
    ]
    assert imports == []


def test_site_has_no_sources_of_its_own(site: Path) -> None:
    assert list(site.rglob("hooks")) == []
    assert list(site.rglob("*.pyc")) == []


@pytest.fixture(scope="module")
def address(built: tuple[Path, str]) -> Iterator[str]:
    """The site on this machine's loopback: search needs a server."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    handler = functools.partial(Handler, directory=str(built[0]))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture
def open_page(watch_page: Callable[..., Any], address: str) -> Callable[..., Any]:
    """Open a page: open_page(path, color_scheme=..., width=...); fails when it said anything."""

    def open_in(path: str, *, color_scheme: str = "light", width: int = 1280) -> Any:
        viewport = {"width": width, "height": 900}
        allowed = (address, "data:", "blob:")
        return watch_page(address + path, allowed, viewport=viewport, color_scheme=color_scheme)

    return open_in


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["", "tutorials/your_own_dataset/", "reference/commands/train/"])
def test_page_follows_the_system_and_fits_when_it_is_opened(
    open_page: Callable[..., Any], path: str, color_scheme: str, tmp_path: Path
) -> None:
    page = open_page(path, color_scheme=color_scheme, width=390)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    levels = [int(value) for value in re.findall(r"\d+", background)[:3]]
    assert (min(levels) > 200) == (color_scheme == "light")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.get_by_role("heading", level=1).count() == 1


def test_search_finds_a_setting_in_the_reference(open_page: Callable[..., Any]) -> None:
    page = open_page("")
    page.keyboard.press("s")
    page.keyboard.type("model.fpn_channels")
    result = page.locator(".md-search-result__link").first
    result.wait_for()
    links = page.locator(".md-search-result__link").evaluate_all("all => all.map((a) => a.href)")
    assert any("reference/commands/train" in html.unescape(link) for link in links)
