"""Scripts that complete commands, options and values in bash, zsh and fish.

Made from the table of options, as help and faults are. A script holds all it knows: it starts no
Python when a key is pressed.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from retinaray.config.command_line import SWITCHES
from retinaray.config.nodes import Job
from retinaray.config.options import Option, OptionTable
from retinaray.errors import ConfigError

Taken = Literal["nothing", "choice", "file", "folder", "text"]

SHELLS = ("bash", "zsh", "fish")
COMMAND = "completion"
_FOLDERS = frozenset({"DIR", "SWEEP_DIR"})
_PATHS = _FOLDERS | {"FILE", "MODEL", "OUTPUT", "RUN", "RUN_URI", "SOURCE"}
_SUMMARY_WIDTH = 72
_LOG_FORMATS = ("text", "json")


@dataclass(frozen=True)
class Word:
    """One option as a shell sees it.

    Attributes:
        names: Its spellings, the one to offer first.
        taken: What stands behind it; "text" is what a shell cannot know.
        choices: The values when `taken` is "choice".
        summary: The beginning of its help.
        metavar: What its value is called.
    """

    names: tuple[str, ...]
    taken: Taken
    choices: tuple[str, ...] = ()
    summary: str = ""
    metavar: str = "VALUE"


@dataclass(frozen=True)
class Command:
    """One command as a shell sees it.

    Attributes:
        name: The verb.
        summary: One line.
        words: Its options.
        arguments: Bare arguments, their names in their order.
        is_open: The last one takes all that come.
        choices: Bare words to offer in place of files.
    """

    name: str
    summary: str
    words: tuple[Word, ...] = ()
    arguments: tuple[str, ...] = ()
    is_open: bool = False
    choices: tuple[str, ...] = ()


def format_completion(
    shell: str, jobs: Mapping[str, type[Job]], summaries: Mapping[str, str]
) -> str:
    """Write the script of one shell.

    Args:
        shell: One of `SHELLS`.
        jobs: Job class by verb, in the order in which verbs are shown.
        summaries: One line per verb.

    Returns:
        Text to source; it ends with a line break.

    Raises:
        ConfigError: If there is no script for this shell.
    """
    writers: Mapping[str, Callable[[Sequence[Command]], str]] = {
        "bash": _format_bash,
        "zsh": _format_zsh,
        "fish": _format_fish,
    }
    if shell not in writers:
        came = shell or "nothing"
        raise ConfigError(
            f"{COMMAND}: expected one of {', '.join(SHELLS)}, got {came}; for example "
            f"source <(retinaray {COMMAND} bash)"
        )
    commands = [describe_command(verb, jobs[verb], summaries[verb]) for verb in jobs]
    summary = "print a script that completes commands in a shell"
    commands.append(Command(COMMAND, summary, choices=SHELLS))
    return writers[shell](commands)


def describe_command(verb: str, job_class: type[Job], summary: str) -> Command:
    """Everything that can be completed behind one verb; settings that only a file has are not."""
    table = OptionTable(job_class)
    words = [_describe_option(o) for o in table.options if o.shape.kind != "mapping"]
    arguments = tuple(o.flag.metavar for o in table.positionals if o.flag is not None)
    is_open = any(option.shape.is_list for option in table.positionals)
    negations = [
        Word((f"--no-{word.names[0][2:]}",), "nothing", summary=f"Not: {word.summary}")
        for word in words
        if word.taken == "nothing"
    ]
    return Command(verb, summary, (*words, *negations, *_list_common_words()), arguments, is_open)


def classify_value(option: Option) -> Taken:
    """What stands behind an option; paths are told by what the help calls them."""
    if option.shape.kind == "bool":
        return "nothing"
    if option.shape.kind == "choice":
        return "choice"
    metavar = option.flag.metavar if option.flag is not None else ""
    parts = [part for part in metavar.split("|") if part != "s3://"]
    if option.shape.kind != "text" or not parts:
        return "text"
    if all(part in _FOLDERS for part in parts):
        return "folder"
    is_path = any(part in _PATHS or re.fullmatch(r"\w*\.[a-z]\w*", part) for part in parts)
    return "file" if is_path else "text"


def _describe_option(option: Option) -> Word:
    return Word(
        names=option.names,
        taken=classify_value(option),
        choices=option.shape.choices,
        summary=textwrap.shorten(option.help, _SUMMARY_WIDTH, placeholder=" ..."),
        metavar=(option.flag.metavar if option.flag is not None else "") or "VALUE",
    )


def _list_common_words() -> Iterator[Word]:
    spellings: dict[str, list[str]] = {}
    for name, switch in SWITCHES.items():
        spellings.setdefault(switch, []).insert(0, name)
    for names in spellings.values():
        yield Word(tuple(names), "nothing")
    yield Word(("--config",), "file", summary="YAML file with settings", metavar="FILE")
    yield Word(("--log-format",), "choice", _LOG_FORMATS, "Lines of the log on standard error")


# --- bash ---------------------------------------------------------------------------------------

_BASH_HEAD = f"""\
# Completion of retinaray for bash. To load it: source <(retinaray {COMMAND} bash)
_retinaray_offer() {{
    local word
    [[ $2 == -W ]] || compopt -o filenames 2>/dev/null
    while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen "${{@:2}}" -- "$1")
}}
_retinaray() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
    local flags= dotted= has_arguments=
    COMPREPLY=()
"""
_BASH_TAIL = """\
    if [[ $current == -*.* ]]; then
        _retinaray_offer "$current" -W "$dotted"
    elif [[ $current == -* || -z $has_arguments ]]; then
        _retinaray_offer "$current" -W "$flags"
    else
        _retinaray_offer "$current" -f
    fi
}
complete -F _retinaray retinaray
"""


def _format_bash(commands: Sequence[Command]) -> str:
    verbs = " ".join([*(command.name for command in commands), "--help", "--version"])
    lines = [
        "    if ((COMP_CWORD == 1)); then",
        f"        _retinaray_offer \"$current\" -W '{verbs}'",
        "        return",
        "    fi",
        "    # bash cuts --option=value into three words.",
        "    if [[ $current == = ]]; then",
        "        current=",
        "    elif [[ $before == = ]]; then",
        "        before=${COMP_WORDS[COMP_CWORD-2]}",
        "    fi",
        "    case ${COMP_WORDS[1]} in",
    ]
    for command in commands:
        lines += [f"    {command.name})", *_list_bash_values(command), "        ;;"]
    return _BASH_HEAD + "\n".join([*lines, "    esac", ""]) + _BASH_TAIL


def _list_bash_values(command: Command) -> Iterator[str]:
    dotted = [name for word in command.words for name in word.names if "." in name]
    yield f"        flags='{' '.join(_list_offered(command))}'"
    yield f"        dotted='{' '.join(dotted)}'"
    yield f"        has_arguments={'yes' if command.arguments else ''}"
    groups: dict[str, list[str]] = {}
    for word in command.words:
        if word.taken != "nothing":
            groups.setdefault(_bash_source(word), []).extend(word.names)
    if groups:
        yield "        case $before in"
        for source, names in groups.items():
            offer = f'_retinaray_offer "$current" {source}; ' if source else ""
            yield f"        {'|'.join(names)}) {offer}return ;;"
        yield "        esac"


def _bash_source(word: Word) -> str:
    sources = {"file": "-f", "folder": "-d", "choice": f"-W '{' '.join(word.choices)}'"}
    return sources.get(word.taken, "")


def _list_offered(command: Command) -> list[str]:
    """Spellings to offer: the short one, dotted ones only where there is no other."""
    return [word.names[0] for word in command.words] or list(command.choices)


# --- zsh ----------------------------------------------------------------------------------------

_ZSH_TAIL = """\
    esac
}
if [[ $funcstack[1] == _retinaray ]]; then
    _retinaray "$@"
else
    compdef _retinaray retinaray
fi
"""


def _format_zsh(commands: Sequence[Command]) -> str:
    lines = [
        "#compdef retinaray",
        f"# Completion of retinaray for zsh. To load it: source <(retinaray {COMMAND} zsh)",
        "_retinaray() {",
        "    if (( CURRENT == 2 )); then",
        "        local -a commands=(",
        *(f"            {_zsh_quote(f'{c.name}:{c.summary}')}" for c in commands),
        "        )",
        "        _describe -t commands command commands",
        "        return",
        "    fi",
        "    local verb=$words[2]",
        "    shift words",
        "    (( CURRENT-- ))",
        "    case $verb in",
    ]
    for command in commands:
        specs = [_zsh_quote(spec) for spec in _list_zsh_specs(command)]
        lines += [f"    {command.name})", "        _arguments \\"]
        lines += [f"            {spec} \\" for spec in specs[:-1]]
        lines += [f"            {specs[-1]}", "        ;;"]
    return "\n".join([*lines, ""]) + _ZSH_TAIL


def _list_zsh_specs(command: Command) -> Iterator[str]:
    if command.choices:
        yield f"1:word:({' '.join(command.choices)})"
    for word in command.words:
        value = ""
        if word.taken != "nothing":
            actions = {"file": "_files", "folder": "_files -/"}
            action = f"({' '.join(word.choices)})" if word.choices else actions.get(word.taken, " ")
            value = f":{_zsh_text(word.metavar)}:{action}"
        for place, name in enumerate(word.names):
            # An exclamation mark: understood, and not offered.
            equals = "=" if value and name.startswith("--") else ""
            summary = f"[{_zsh_text(word.summary)}]" if word.summary else ""
            yield f"{'!' if place else ''}{name}{equals}{summary}{value}"
    for place, name in enumerate(command.arguments, start=1):
        is_last = place == len(command.arguments)
        position = "*" if is_last and command.is_open else str(place)
        yield f"{position}:{_zsh_text(name)}:_files"


def _zsh_text(text: str) -> str:
    return re.sub(r"([\\\[\]:])", r"\\\1", text)


def _zsh_quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# --- fish ---------------------------------------------------------------------------------------


def _format_fish(commands: Sequence[Command]) -> str:
    start = "complete -c retinaray"
    lines = [f"# Completion of retinaray for fish. To load it: retinaray {COMMAND} fish | source"]
    for command in commands:
        text = _fish_quote(command.summary)
        lines.append(f"{start} -f -n __fish_use_subcommand -a {command.name} -d {text}")
    for command in commands:
        condition = f"{start} -n '__fish_seen_subcommand_from {command.name}'"
        if not command.arguments:
            lines.append(f"{condition} -f")
        if command.choices:
            lines.append(f"{condition} -a '{' '.join(command.choices)}'")
        lines += [f"{condition} {_fish_option(word)}" for word in command.words]
    return "\n".join([*lines, ""])


def _fish_option(word: Word) -> str:
    values = {
        "file": ["-r", "-F"],
        "folder": ["-x", "-a", "'(__fish_complete_directories)'"],
        "choice": ["-x", "-a", f"'{' '.join(word.choices)}'"],
        "text": ["-x"],
    }
    # fish offers whatever it knows: second spellings would double the list.
    names = [f"-l {word.names[0][2:]}"]
    names += [f"-s {name[1:]}" for name in word.names if not name.startswith("--")]
    summary = ["-d", _fish_quote(word.summary)] if word.summary else []
    return " ".join([*names, *values.get(word.taken, []), *summary])


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
