"""Reference pages made from the tables that the commands themselves are made from.

A hook of MkDocs: a page per command, the overview, and the exit codes. Nothing is written below
docs/.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from cell_text import escape
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from retinaray import errors
from retinaray.cli import EXIT_CODES, VERBS
from retinaray.config.completion import classify_value
from retinaray.config.help_text import show_default
from retinaray.config.nodes import Job
from retinaray.config.odtk_flags import list_odtk_flags
from retinaray.config.options import Option, OptionTable
from retinaray.endings import judge_error

_HEAD = "| option and setting | meaning | takes | default |\n| --- | --- | --- | --- |"
_EXAMPLE_WIDTH = 80
_ODTK_VERBS = ("train", "infer", "export")
_SPELLING = """\
Each setting can be given by its short option (`--resize 640`), by its path as an option
(`--data.resize 640`), as a bare word (`data.resize=640`), and in the YAML file of `--config`,
nested by section. Options win over the file. Lists take values separated by spaces. Settings that
may be empty take the word `none`. A switch `--name` has the opposite `--no-name`.
"""
_COMMON = """\
| option | meaning |
| --- | --- |
| `--config FILE` | YAML file with settings, nested by section; options win over it. |
| `--print-config` | Print the resolved settings as YAML, which `--config` reads, and exit. |
| `-v`, `--verbose` | Log more; show tracebacks. |
| `-q`, `--quiet` | Log warnings and errors only. |
| `--json` | For programs: one JSON object on standard output, no table for people. |
| `--log-format {text,json}` | Lines of the log on standard error. |
| `-h`, `--help` | Show the command's help and exit. |
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {"reference/index.md": _write_overview(), "reference/exit_codes.md": _write_codes()}
    for verb in VERBS:
        pages[f"reference/commands/{verb}.md"] = _write_command(verb)
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def _write_overview() -> str:
    rows = [f"| [`{name}`](commands/{name}.md) | {verb.help} |" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "# Commands",
            "",
            "These pages are made from the same tables as `--help`.",
            "",
            "| command | what it does |",
            "| --- | --- |",
            *rows,
            "",
            "## How settings are given",
            "",
            _SPELLING,
            "Wrong settings are reported all at once, before anything is started.",
            "",
            "## Options of every command",
            "",
            _COMMON,
            "See also [exit codes](exit_codes.md), [the JSON line](json_line.md) and "
            "[files](files.md).",
            "",
        ]
    )


def _write_command(verb: str) -> str:
    job_class = _load_job(verb)
    table = OptionTable(job_class)
    examples = "\n".join(map(_wrap_example, job_class.examples))
    text = escape(inspect.getdoc(job_class) or "")
    parts = [f"# retinaray {verb}", text, "## Examples", f"```sh\n{examples}\n```"]
    parts += ["## Input and output", _write_table(table, "")]
    for name, section in table.sections.items():
        rows = _write_table(table, name)
        if rows:
            title = escape((inspect.getdoc(section) or name).partition("\n")[0].rstrip("."))
            parts += [f"## {title} (`{name}`) {{ #{name.replace('.', '-')} }}", rows]
    if verb in _ODTK_VERBS:
        parts += ["## Flags of ODTK", _write_odtk_flags(verb, table)]
    parts.append(
        "## More\n\n[Options of every command](../index.md#options-of-every-command), "
        f"[its JSON line](../json_line.md#{verb}), [exit codes](../exit_codes.md)."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _wrap_example(line: str) -> str:
    pieces = textwrap.wrap(line, _EXAMPLE_WIDTH, break_on_hyphens=False, break_long_words=False)
    return " \\\n    ".join(pieces)


def _load_job(verb: str) -> type[Job]:
    module, _, name = VERBS[verb].job.partition(":")
    job_class: type[Job] = getattr(importlib.import_module(module), name)
    return job_class


def _write_table(table: OptionTable, section: str) -> str:
    options = [option for option in table.options if ".".join(option.path[:-1]) == section]
    return "\n".join([_HEAD, *map(_write_row, options)]) if options else ""


def _write_row(option: Option) -> str:
    cells = [
        "<br>".join(f"`{name}`" for name in _list_spellings(option)),
        escape(option.help),
        escape(_say_expected(option)),
        escape(show_default(option).strip("[]")),
    ]
    return f"| {' | '.join(cells)} |"


def _say_expected(option: Option) -> str:
    text = option.shape.expected
    if classify_value(option) in ("file", "folder"):
        return text.replace("a text that is not empty", "a path or URI").replace("texts", "paths")
    return text.replace("a text that is not empty", "a text")


def _list_spellings(option: Option) -> Iterator[str]:
    """The short option with its value's name, then the path."""
    metavar = option.flag.metavar if option.flag is not None else ""
    # A bar would end the cell of the table.
    value = metavar.replace("|", " or ")
    if option.is_positional:
        yield f"{value} ..." if option.shape.is_list else value
    elif option.flag is not None:
        yield f"{option.flag.name} {value}".strip()
    yield option.key


def _write_odtk_flags(verb: str, table: OptionTable) -> str:
    flags = {
        name: flag for name, flag in list_odtk_flags(verb).items() if name not in table.by_name
    }
    rows = []
    for name, flag in flags.items():
        if flag.change is not None:
            meaning = f"the same as `{flag.change[0]}={flag.change[1]}`"
        else:
            meaning = escape(f"refused: {flag.answer}") if flag.answer else "understood"
        rows.append(f"| `{name}` | {meaning} |")
    return "\n".join(["| flag | what becomes of it |", "| --- | --- |", *rows])


def _write_codes() -> str:
    rows = []
    for error in _walk_errors(errors.RetinarayError):
        fault = judge_error(error("..."))
        text = escape(" ".join((inspect.getdoc(error) or "").split()))
        rows.append(f"| `{error.__name__}` | {fault.exit_code if fault else ''} | {text} |")
    return "\n".join(
        [
            "# Exit codes",
            "",
            "```text",
            EXIT_CODES,
            "```",
            "",
            "## Errors",
            "",
            "Each error that a command can end with is told in words, without a traceback.",
            "",
            "| error | exit code | meaning |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _walk_errors(error: Any) -> Iterator[Any]:
    for child in error.__subclasses__():
        yield child
        yield from _walk_errors(child)
