"""The text of `--help`, made from the table of options."""

from __future__ import annotations

import argparse
import inspect
import textwrap

from retinaray.config.nodes import Config, Job
from retinaray.config.options import Option, OptionTable

_MAX_INLINE_CHOICES = 30
_EXAMPLE_WIDTH = 88
_NO_BREAK = "\N{NO-BREAK SPACE}"
_COMMON = (
    (("--config",), "FILE", "YAML file with settings, nested by section; options win over it."),
    (("--print-config",), None, "Print the resolved settings as YAML and exit."),
    (("-v", "--verbose"), None, "Log more; show tracebacks."),
    (("-q", "--quiet"), None, "Log warnings and errors only."),
    (
        ("--json",),
        None,
        "For programs: one JSON object on standard output, also when the command fails; no table.",
    ),
    (("--log-format",), "{text,json}", "Lines of the log on standard error. [text]"),
    (("-h", "--help"), None, "Show this text and exit."),
)


def format_help(job_class: type[Job], table: OptionTable, epilog: str = "") -> str:
    """Write the help of one command, one group per section, as wide as the terminal.

    Args:
        job_class: The job.
        table: Its settings.
        epilog: Text for the end.
    """
    names = " ".join(_name_positional(option) for option in table.positionals)
    examples = "\n".join(_wrap_example(line) for line in job_class.examples)
    parser = argparse.ArgumentParser(
        prog=f"retinaray {job_class.verb}",
        usage=" ".join(f"%(prog)s {names} [options] [section.key=value ...]".split()),
        description=f"{inspect.getdoc(job_class)}\n\nexamples:\n{examples}",
        epilog=f"{_KEYS_NOTE}\n\n{epilog}".strip(),
        formatter_class=_HelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    _add_group(parser, "Input and output", "", table)
    for name, section in table.sections.items():
        _add_group(parser, _title(name, section), name, table)
    common = parser.add_argument_group("Every command")
    for flags, metavar, text in _COMMON:
        if metavar is None:
            common.add_argument(*flags, action="store_true", help=text)
        else:
            common.add_argument(*flags, metavar=metavar, help=text)
    return parser.format_help().replace(_NO_BREAK, " ")


def list_options(table: OptionTable) -> list[dict[str, object]]:
    """Every setting of a command as plain values, for `--help --json`.

    Returns:
        One object per setting: key (dotted path), flags, positional, expected, default (None when
        required), required, unit, help.
    """
    return [
        {
            "key": option.key,
            "flags": list(option.names),
            "positional": option.is_positional,
            "expected": option.shape.expected,
            "default": None if option.is_required else option.default,
            "required": option.is_required,
            "unit": option.flag.unit if option.flag is not None else "",
            "help": option.help,
        }
        for option in table.options
    ]


_KEYS_NOTE = (
    "Every setting also has its YAML key as an option: --data.resize 640, or data.resize=640.\n"
    "Lists take values separated by spaces; settings that may be empty take the word none.\n"
    "ODTK's command lines are understood; a flag that is not needed here says so."
)


def show_default(option: Option) -> str:
    """Write the default and the unit for the end of a help line, as in `[800 px]`."""
    unit = option.flag.unit if option.flag is not None else ""
    default = "required" if option.is_required else _show(option.default)
    if option.default is None and "none" in option.shape.choices:
        default = "not given"
    is_amount = default not in ("required", "none", "not given")
    return f"[{(' ' if is_amount else '; ').join(part for part in (default, unit) if part)}]"


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)


def _wrap_example(line: str) -> str:
    pieces = textwrap.wrap(line, _EXAMPLE_WIDTH, break_on_hyphens=False, break_long_words=False)
    return "  " + " \\\n      ".join(pieces)


def _show(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        return " ".join(_show(element) for element in value) or "none"
    return str(value)


def _title(name: str, section: type[Config]) -> str:
    return f"{(inspect.getdoc(section) or name).rstrip('.')} ({name}.*)"


def _name_positional(option: Option) -> str:
    name = option.flag.metavar if option.flag is not None else option.key
    if option.shape.is_list:
        name = f"{name} [{name} ...]"
    return name if option.is_required else f"[{name}]"


def _add_group(
    parser: argparse.ArgumentParser, title: str, section: str, table: OptionTable
) -> None:
    options = [option for option in table.options if ".".join(option.path[:-1]) == section]
    if not options:
        return
    group = parser.add_argument_group(title)
    for option in options:
        text = _describe(option).replace("%", "%%")
        if option.is_positional:
            group.add_argument(option.key, metavar=_name_positional(option), help=text)
        elif option.shape.kind == "bool":
            flags = (option.names[0], f"--no-{option.names[0][2:]}")
            group.add_argument(*flags, action="store_true", help=text)
        else:
            group.add_argument(option.names[0], metavar=_metavar(option), help=text)


def _describe(option: Option) -> str:
    parts = [option.help]
    if option.shape.choices and _metavar(option) == "NAME":
        parts.append(f"One of {', '.join(option.shape.choices)}.")
    parts.append(show_default(option).replace(" ", _NO_BREAK))
    if option.names[0] != f"--{option.key}" and _differs(option):
        parts.append(f"({option.key})")
    return " ".join(parts)


def _differs(option: Option) -> bool:
    return option.names[0].lstrip("-").replace("-", "_") != option.path[-1]


def _metavar(option: Option) -> str:
    if option.flag is not None and option.flag.metavar:
        return option.flag.metavar
    if option.shape.kind == "choice":
        choices = "{" + ",".join(option.shape.choices) + "}"
        return choices if len(choices) <= _MAX_INLINE_CHOICES else "NAME"
    if option.shape.kind == "mapping":
        return "(YAML only)"
    if option.flag is not None and option.flag.unit == "px":
        name = "PX"
    else:
        name = {"int": "N", "float": "X"}.get(option.shape.kind, "TEXT")
    return f"{name} [{name} ...]" if option.shape.is_list else name
