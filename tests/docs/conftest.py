"""The pages of the documentation: their commands read, checked, and run in a small folder.

A comment directly before a fenced block directs how its commands are tested:

    <!-- needs: gpu -->       read, not run; gpu, cloud, jetson, network, cluster, or data for files
                              of the reader's own
    <!-- test: ARGUMENTS -->  appended to the commands of the block whose verb is that of the first
    <!-- test VERB: ARGUMENTS -->  appended to the commands of this verb
    <!-- expect: exit 2 -->   how every command of the block ends
    <!-- setup: NAME -->      what is there before: `model.pth` or `model.onnx`, a network that
                              finds something; `demo_run`, what `make demo` leaves of data and of a
                              training; `retinanet_rn18fpn.pth`, a checkpoint of ODTK's; `s3`, a
                              server whose bucket `bucket` holds images/; or a file name, for the
                              last block of YAML or Python above

A block of text shows what is read, not typed: a command of `retinaray` in it is a fault, a synopsis
with words in capitals or `...` is none.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NEEDS = frozenset({"gpu", "cloud", "jetson", "network", "cluster", "data"})
PREPARED = frozenset({"model.pth", "model.onnx", "demo_run", "retinanet_rn18fpn.pth", "s3"})
# Need no Ray, and take seconds.
SHORT_PAGES = ("docs/explanation/anchors.md", "docs/explanation/thresholds.md")
_PROGRAMS = frozenset(
    {
        *("aws", "cat", "cd", "cp", "do", "docker", "done", "export", "for", "git", "head"),
        *("kubectl", "ls", "make", "mkdir", "mlflow", "mv", "nvidia-smi", "pip", "python", "ray"),
        *("rm", "scp", "sh", "sleep", "source", "ssh", "tail", "tensorboard", "tmux", "top"),
        *("unzip", "base64", "bash", "watch", "while", "retinaray", ".venv/bin/retinaray"),
    }
)
# They bring about what later commands need.
_RUN_BY_SHELL = frozenset(
    {"cat", "cp", "head", "ls", "mkdir", "mv", "python", "rm", "tail", "unzip"}
)
_SHELL_NAMES = frozenset({"bash", "shell", "console", "zsh"})
_DIRECTIVE = re.compile(r"<!--\s*([a-z]+)(?:\s+([a-z-]+))?:\s*(.*?)\s*-->")
_FENCE = re.compile(r"(\s*)(`{3,})([\w+-]*).*")
# `AP` is a value, `DIR` stands for one.
_SYNOPSIS = re.compile(r"\.\.\.|\b[A-Z]{3,}\b")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One command of a page.

    Attributes:
        place: Page and line, for messages.
        words: As a shell splits it, without what redirects it.
        needs: Why it is not run; empty when it is.
        extra: Arguments that make it small.
        exit_code: How it ends.
        setups: What has to be there before.
        output: File that its standard output goes to; empty for none.
        environment: Variables that are set for it.
    """

    place: str
    words: tuple[str, ...]
    needs: str = ""
    extra: tuple[str, ...] = ()
    exit_code: int = 0
    setups: tuple[str, ...] = ()
    output: str = ""
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def argv(self) -> tuple[str, ...] | None:
        """Arguments of `retinaray`; none for another program."""
        return find_arguments(self.words)

    @property
    def is_for_shell(self) -> bool:
        """Whether it is run as another program is."""
        return self.argv is None and self.words[0] in _RUN_BY_SHELL


@dataclass
class Page:
    """What a page says that can be tested.

    Attributes:
        name: Path in the repository.
        commands: In their order.
        files: Blocks that a setup names, by the name.
        faults: What is wrong with its directives; a line each.
    """

    name: str
    commands: list[Command] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def find_arguments(words: tuple[str, ...]) -> tuple[str, ...] | None:
    """What `retinaray` is given, however it is started; None when it is not."""
    match words:
        case ("retinaray" | ".venv/bin/retinaray", *rest):
            return tuple(rest)
        case ("python", "-m", "retinaray", *rest):
            return tuple(rest)
        case ("python", script, *rest) if re.fullmatch(r"jobs/\w+\.py", script):
            return (Path(script).stem, *rest)
        case ("ray", "job", "submit", *rest) if "--" in rest:
            return find_arguments(tuple(rest[rest.index("--") + 1 :]))
    return None


def read_page(text: str, name: str) -> Page:
    """Read the commands of one page."""
    page = Page(name)
    reader = _PageReader(page)
    for number, line in enumerate(text.splitlines(), start=1):
        reader.take(number, line)
    reader.end()
    return page


class _PageReader:
    def __init__(self, page: Page) -> None:
        self._page = page
        self._directives: list[tuple[int, str, str, str]] = []
        self._fence = ""
        self._language = ""
        self._block: list[tuple[int, str]] = []
        self._sources: dict[str, str] = {}

    def take(self, number: int, line: str) -> None:
        """One line, from the top of the page on."""
        fence = _FENCE.fullmatch(line)
        if self._fence:
            if fence and fence[2] == self._fence and not fence[3]:
                self._end_block()
            else:
                self._block.append((number, line))
        elif fence:
            self._fence, self._language, self._block = fence[2], fence[3], []
        elif found := _DIRECTIVE.fullmatch(line.strip()):
            self._directives.append((number, found[1], found[2] or "", found[3]))
        elif line.strip():
            self.end()

    def end(self) -> None:
        """What stands before no block is a fault."""
        for number, key, _, _ in self._directives:
            self._fault(number, f"`{key}:` stands directly before no block of commands")
        self._directives = []

    def _fault(self, number: int, text: str) -> None:
        self._page.faults.append(f"{self._page.name}:{number}: {text}")

    def _end_block(self) -> None:
        self._fence = ""
        if self._language in _SHELL_NAMES:
            self._fault(self._block[0][0], f"commands are tagged sh, not {self._language}")
        if self._language == "text":
            self._refuse_commands()
        if self._language in ("yaml", "python"):
            self._sources[self._language] = "\n".join(line for _, line in self._block) + "\n"
        commands = list(self._read_commands()) if self._is_shell() else []
        if not commands:
            self.end()
            return
        settings = self._read_directives(commands)
        self._directives = []
        for command in commands:
            verb = (command.argv or ("",))[0]
            self._page.commands.append(
                Command(
                    command.place,
                    command.words,
                    needs=settings.needs,
                    extra=settings.extra.get(verb, ()),
                    exit_code=settings.exit_code,
                    setups=tuple(settings.setups),
                    output=command.output,
                    environment=command.environment,
                )
            )

    def _refuse_commands(self) -> None:
        for number, line in self._block:
            if line.split()[:1] == ["retinaray"] and not _SYNOPSIS.search(line):
                self._fault(number, "a command that no test reads; tag its block sh")

    def _is_shell(self) -> bool:
        first = next((line.split()[0] for _, line in self._block if _is_command(line)), "")
        return self._language == "sh" or (not self._language and first in _PROGRAMS)

    def _read_commands(self) -> Iterator[Command]:
        joined, start = "", 0
        for number, line in self._block:
            start = start if joined else number
            joined += line.removesuffix("\\") + " "
            if line.endswith("\\"):
                continue
            yield from self._split(start, joined)
            joined = ""

    def _split(self, number: int, line: str) -> Iterator[Command]:
        place = f"{self._page.name}:{number}"
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError as error:
            self._fault(number, f"no shell reads this: {error}")
            return
        for piece, output in _cut(words):
            assigned = [found for word in piece if (found := _ASSIGNMENT.fullmatch(word))]
            variables = tuple(
                (found[1], found[2])
                for found, word in zip(assigned, piece, strict=False)
                if found[0] == word
            )
            rest = tuple(piece[len(variables) :])
            if not rest:
                continue
            if rest[0] not in _PROGRAMS:
                self._fault(number, f"{rest[0]}: a program that no page has used before")
            yield Command(place, rest, output=output, environment=variables)

    def _read_directives(self, commands: list[Command]) -> _Settings:
        settings = _Settings()
        verbs = [command.argv[0] for command in commands if command.argv]
        for number, key, verb, value in self._directives:
            if key == "needs":
                settings.needs = value
                if value not in NEEDS:
                    self._fault(number, f"needs: {value}: expected one of {sorted(NEEDS)}")
            elif key == "test" and verbs:
                settings.extra[verb or verbs[0]] = tuple(shlex.split(value))
                if verb and verb not in verbs:
                    self._fault(number, f"test {verb}: no such command in the block")
            elif key == "expect" and (code := re.fullmatch(r"exit (\d+)", value)):
                settings.exit_code = int(code[1])
            elif key == "setup":
                settings.setups.append(value)
                self._take_source(number, value)
            else:
                self._fault(number, f"`{key}: {value}` directs nothing")
        return settings

    def _take_source(self, number: int, name: str) -> None:
        if name in PREPARED:
            return
        language = {".yaml": "yaml", ".yml": "yaml", ".py": "python"}.get(Path(name).suffix, "")
        if language not in self._sources:
            self._fault(number, f"setup: {name}: expected {sorted(PREPARED)} or a block above")
            return
        self._page.files.setdefault(name, self._sources[language])


@dataclass
class _Settings:
    needs: str = ""
    exit_code: int = 0
    extra: dict[str, tuple[str, ...]] = field(default_factory=dict)
    setups: list[str] = field(default_factory=list)


def _is_command(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _cut(words: list[str]) -> Iterator[tuple[list[str], str]]:
    """Pieces between the signs of a shell, each with the file that its output goes to."""
    piece: list[str] = []
    output = ""
    rest = iter(words)
    for word in rest:
        if word in (">", ">>"):
            output = next(rest, "")
        elif re.fullmatch(r"[();<>|&]+", word):
            yield piece, output
            piece, output = [], ""
        else:
            piece.append(word)
    yield piece, output


def list_pages() -> list[str]:
    """Every page whose commands are tested, by its path in the repository."""
    pages = sorted(path.relative_to(REPOSITORY).as_posix() for path in _walk_docs())
    return ["README.md", "cluster/README.md", *pages]


def _walk_docs() -> Iterator[Path]:
    return (REPOSITORY / "docs").rglob("*.md")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`page_name`, `short_page_name`, `long_page_name`: one test per page, short page, other."""
    pages = list_pages()
    groups = {
        "page_name": pages,
        "short_page_name": SHORT_PAGES,
        "long_page_name": [name for name in pages if name not in SHORT_PAGES],
    }
    for name, values in groups.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)


@pytest.fixture
def page(page_name: str) -> Page:
    """One page of the documentation."""
    return _read_file(page_name)


@pytest.fixture
def short_page(short_page_name: str) -> Page:
    """A page whose commands take seconds."""
    return _read_file(short_page_name)


@pytest.fixture
def long_page(long_page_name: str) -> Page:
    """A page whose commands may take minutes, and Ray."""
    return _read_file(long_page_name)


def _read_file(name: str) -> Page:
    return read_page((REPOSITORY / name).read_text("utf-8"), name)


@pytest.fixture(scope="session")
def read_text() -> Callable[[str], Page]:
    """Read a page that is no file."""
    return lambda text: read_page(text, "page.md")


@pytest.fixture(scope="session")
def list_keys() -> Callable[[str], set[str]]:
    """Keys of a command's JSON line, as the reference has them."""
    pytest.importorskip("mkdocs", reason="needs mkdocs-material, which is not installed")
    path = REPOSITORY / "docs" / "hooks" / "contracts.py"
    spec = importlib.util.spec_from_file_location("docs_contracts", path)
    assert spec is not None
    assert spec.loader is not None
    contracts = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[spec.name] = contracts
    # As MkDocs does while it loads a hook.
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        spec.loader.exec_module(contracts)
    sources = contracts.Sources(REPOSITORY / "platform")
    return lambda verb: set(contracts.list_keys(sources.find_outcome(verb), "to_json", sources))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder with mkdocs.yml."""
    return REPOSITORY
