"""Split a command line into changes of settings, switches and faults, without judging the values.

Not argparse: it stops at the first fault, hands the value of an unknown option to the next
positional argument, and lets `--size 640 model.pth` swallow the file name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from retinaray.config.odtk_flags import SCHEDULE, OdtkFlag
from retinaray.config.options import Option, OptionTable

SWITCHES: Mapping[str, str] = {
    "-h": "help",
    "--help": "help",
    "--print-config": "print-config",
    "-v": "verbose",
    "--verbose": "verbose",
    "-q": "quiet",
    "--quiet": "quiet",
    "--json": "json",
}
_CONFIG = "--config"
_CHANGE = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)=(.*)", re.DOTALL)
_NEGATIVE_NUMBER = re.compile(r"-\.?\d")
_NUMBER_LIKE = re.compile(r"[-+]?[.\d][-+.,\deE]*")
_TRUTH_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "1", "0", "none"})


@dataclass
class CommandLine:
    """What a command line says.

    Attributes:
        changes: Values by dotted key, texts or lists of texts, in the order they came.
        spellings: How each key was spelled, such as `--resize`.
        switches: Names from `SWITCHES` that were given.
        config_file: Value of `--config`; empty when not given.
        schedule_factor: Value of ODTK's `--schedule`; empty when not given.
        faults: One line per fault.
    """

    changes: dict[str, object] = field(default_factory=dict)
    spellings: dict[str, str] = field(default_factory=dict)
    switches: set[str] = field(default_factory=set)
    config_file: str = ""
    schedule_factor: str = ""
    faults: list[str] = field(default_factory=list)


def read_command_line(
    argv: Sequence[str], table: OptionTable, odtk_flags: Mapping[str, OdtkFlag]
) -> CommandLine:
    """Split a command line.

    Args:
        argv: Arguments after the verb; may be empty.
        table: Settings of the job.
        odtk_flags: Flags to translate or answer.

    Returns:
        Changes, switches, and every fault; nothing is raised.
    """
    return _Scanner(argv, table, odtk_flags).scan()


class _Scanner:
    def __init__(
        self, argv: Sequence[str], table: OptionTable, odtk_flags: Mapping[str, OdtkFlag]
    ) -> None:
        self._rest = list(argv)
        self._table = table
        # A setting of this job wins over ODTK's flag of the same name.
        self._odtk = {n: flag for n, flag in odtk_flags.items() if n not in table.by_name}
        self._positionals = list(table.positionals)
        self._found = CommandLine()

    def scan(self) -> CommandLine:
        while self._rest:
            token = self._rest.pop(0)
            if token == "--":
                while self._rest:
                    self._take_bare(self._rest.pop(0))
            elif _is_option(token):
                self._take_option(token)
            else:
                self._take_bare(token)
        if {"verbose", "quiet"} <= self._found.switches:
            self._fault("--verbose and --quiet are both given: keep one")
        return self._found

    def _fault(self, text: str) -> None:
        self._found.faults.append(text)

    def _change(self, option: Option, value: object, spelling: str) -> None:
        self._found.changes[option.key] = value
        self._found.spellings[option.key] = spelling

    def _take_option(self, token: str) -> None:
        name, equals, inline = token.partition("=")
        value = inline if equals else None
        positive = f"--{name[5:]}"
        if name in SWITCHES:
            self._take_switch(name, value)
        elif name == _CONFIG:
            self._take_config(value)
        elif name in self._table.by_name:
            self._take_setting(self._table.by_name[name], name, value)
        elif name in self._odtk:
            self._take_odtk(name, self._odtk[name], value)
        elif name.startswith("--no-") and self._is_switchable(positive):
            self._take_negation(self._table.by_name[positive], name, value)
        else:
            self._take_unknown(name, value)

    def _is_switchable(self, name: str) -> bool:
        option = self._table.by_name.get(name)
        return option is not None and option.shape.kind == "bool"

    def _take_switch(self, name: str, value: str | None) -> None:
        if value is not None:
            self._fault(f"{name}={value}: takes no value; give {name} alone")
        self._found.switches.add(SWITCHES[name])

    def _take_config(self, inline: str | None) -> None:
        value = self._one_value(inline)
        if not value:
            self._fault(f"{_CONFIG}: expected a YAML file after it")
        elif self._found.config_file:
            self._fault(f"{_CONFIG} {value}: given twice; merge the two files into one")
        else:
            self._found.config_file = value

    def _take_setting(self, option: Option, name: str, inline: str | None) -> None:
        if option.shape.kind == "bool":
            if inline is None and self._rest and self._rest[0].lower() in _TRUTH_WORDS:
                inline = self._rest.pop(0)
            self._change(option, "true" if inline is None else inline, name)
            return
        is_list = option.shape.is_list
        value = self._list_values(option, inline) if is_list else self._one_value(inline)
        if value is None:
            self._fault(f"{option.key} ({name}): no value came; expected {option.shape.expected}")
            return
        self._change(option, value, name)
        # `--backbone A B` of ODTK: the second name is no positional argument. Elsewhere it may be,
        # such as a folder that is called as the format that is written to it.
        if option.key != "model.backbone" or inline is not None:
            return
        if more := self._take_while(lambda word: word in option.shape.choices):
            came = " ".join([str(value), *more])
            self._fault(f"{name}: takes one value, and {1 + len(more)} came ({came}); give one")

    def _take_negation(self, option: Option, name: str, value: str | None) -> None:
        if value is not None:
            self._fault(f"{name}={value}: takes no value; give {option.names[0]}={value}")
        else:
            self._change(option, "false", name)

    def _take_odtk(self, name: str, flag: OdtkFlag, inline: str | None) -> None:
        value = inline
        if flag.num_values == "one":
            value = self._one_value(inline)
        elif flag.num_values == "many" and inline is None:
            self._number_values()
        if name == SCHEDULE:
            self._found.schedule_factor = value or ""
            if not value:
                self._fault(f"{name}: no value came; expected a number > 0, such as 0.5")
        elif flag.change is not None:
            key, text = flag.change
            self._change(self._table.by_name[f"--{key}"], text, name)
        else:
            self._fault(f"{name}: {flag.answer}")

    def _take_unknown(self, name: str, inline: str | None) -> None:
        nearest = self._table.nearest(name, (*SWITCHES, _CONFIG, *self._odtk))
        hint = f"nearest: {nearest}" if nearest else "--help lists all"
        guess = self._table.by_name.get(nearest.partition(" ")[0])
        taken = [] if inline is None else [inline]
        if inline is None and (guess is None or guess.shape.kind != "bool"):
            # Its value must not be mistaken for a positional argument.
            is_list = guess is not None and guess.shape.is_list
            value = None if is_list else self._one_value(None)
            taken = self._number_values() if is_list else [value] if value is not None else []
        shown = " ".join([name, *taken])
        self._fault(f"{shown}: no such option; {hint}")

    def _take_bare(self, token: str) -> None:
        change = _CHANGE.fullmatch(token)
        if change is not None:
            self._take_change(token, change[1], change[2])
        elif self._positionals:
            self._take_positional(token)
        else:
            self._fault(f"argument {token}: not expected here; an option's name must precede it")

    def _take_positional(self, token: str) -> None:
        option = self._positionals[0]
        if not option.shape.is_list:
            self._positionals.pop(0)
            self._change(option, token, option.spelling)
            return
        # The last one takes all that come; see `OptionTable`.
        values = self._found.changes.get(option.key)
        if isinstance(values, list):
            values.append(token)
        else:
            self._change(option, [token], option.spelling)

    def _take_change(self, token: str, key: str, value: str) -> None:
        option = self._table.by_path.get(tuple(key.split(".")))
        if option is not None:
            values = _split_list(value) if option.shape.is_list else value
            self._change(option, values, key)
            return
        owner = self._table.by_path.get((key.partition(".")[0],))
        if owner is not None and owner.shape.kind == "mapping":
            self._fault(f"{token}: expected {owner.shape.expected} under `{owner.key}`")
            return
        nearest = self._table.nearest(key)
        hint = f"nearest: {nearest}" if nearest else f"for a file of this name write ./{token}"
        self._fault(f"{token}: no such key; {hint}")

    def _one_value(self, inline: str | None) -> str | None:
        if inline is not None:
            return inline
        return self._rest.pop(0) if self._rest and not _is_option(self._rest[0]) else None

    def _list_values(self, option: Option, inline: str | None) -> list[str] | None:
        if inline is not None:
            return _split_list(inline)
        first = self._one_value(None)
        if first is None:
            return [] if option.shape.count == "" else None
        return [first, *self._number_values()]

    def _number_values(self) -> list[str]:
        return self._take_while(lambda word: _NUMBER_LIKE.fullmatch(word) is not None)

    def _take_while(self, is_taken: Callable[[str], bool]) -> list[str]:
        taken = list(takewhile(is_taken, self._rest))
        del self._rest[: len(taken)]
        return taken


def _is_option(token: str) -> bool:
    return token.startswith("-") and token != "-" and _NEGATIVE_NUMBER.match(token) is None


def _split_list(text: str) -> list[str]:
    return re.split(r"[\s,]+", text.strip("[]() ")) if text.strip("[]() ") else []
