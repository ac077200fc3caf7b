"""Command that prints the settings with their documentation, and writes docs/settings.md."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby

from reid.commands.arguments import Parser
from reid.config.parsing import example, nearest
from reid.config.schema import SECTION_TITLES, SECTIONS, SETTINGS
from reid.errors import SettingsError
from reid.process.logs import write_output

_INTRODUCTION = """\
# Settings

Every setting, in the order of configuration files, with its default and what is allowed. A setting is given in a YAML
file (`--config_file FILE`) or after it on the command line, as `KEY VALUE` or `KEY=VALUE`; the last one wins. The
defaults are the published recipe of reid-strong-baseline. The same text on the console:
`python launch/settings.py [PREFIX]`.

Written by `python launch/settings.py --markdown > docs/settings.md`; do not edit it here.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the settings that the arguments ask for; return the exit code."""
    parser = Parser("[PREFIX] [--markdown]", "Print the settings with default, allowed values and documentation.")
    prefix_help = "first letters of a section or key, in any case: solver, solver.base, base_lr"
    parser.add_argument("prefix", nargs="?", default="", metavar="PREFIX", help=prefix_help)
    parser.add_argument("--markdown", action="store_true", help="print Markdown, as docs/settings.md holds it")
    try:
        parsed = parser.parse_args(arguments)
        keys = matching(parsed.prefix)
    except SettingsError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    width = min(max(shutil.get_terminal_size().columns, 80), 120)
    write_output(markdown(keys) if parsed.markdown else plain(keys, width))
    return 0


def matching(prefix: str) -> list[str]:
    """Return the keys that start with a prefix, or whose last name does, regardless of case.

    Raises:
        SettingsError: There are none.
    """
    lower = prefix.lower()
    keys = [key for key in SETTINGS if key.lower().startswith(lower)]
    keys = keys or [key for key in SETTINGS if key.lower().rpartition(".")[2].startswith(lower)]
    if not keys:
        near = nearest(prefix, [*SETTINGS, *SECTIONS]) or [section for section in SECTION_TITLES if section]
        raise SettingsError(
            f"PREFIX must start a section or key, got {prefix!r}; did you mean {' or '.join(near)}?", key="PREFIX"
        )
    return keys


def plain(keys: Iterable[str], width: int) -> str:
    """Return the settings as text for a console of `width` columns."""
    lines = []
    for key in keys:
        lines.append(key)
        for paragraph in (_facts(key), SETTINGS[key].doc):
            lines += _wrapped(paragraph, width, "    ")
        lines.append("")
    return "\n".join(lines)


def markdown(keys: Iterable[str]) -> str:
    """Return the settings as Markdown, one chapter for each section."""
    lines = [_INTRODUCTION]
    for section, members in groupby(keys, key=_section):
        lines += [f"## {SECTION_TITLES[section]}", ""]
        for key in members:
            lines += [f"### `{key}`", ""]
            lines += [*_wrapped(_facts(key, code="`"), 120), "", *_wrapped(SETTINGS[key].doc, 120), ""]
    return "\n".join(lines)


def _section(key: str) -> str:
    return key.partition(".")[0] if "." in key else ""


def _facts(key: str, code: str = "") -> str:
    setting = SETTINGS[key]
    unit = f" ({setting.unit})" if setting.unit else ""
    return f"Default: {code}{example(setting.default)}{code}{unit}. Allowed: {setting.validate.allowed}."


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
