"""The commands of launch/: what each takes on its command line besides settings."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from reid.config.schema import SETTINGS
from reid.errors import SettingsError

FORMATS = ("onnx", "torch", "safetensors")
CHECKS = ("evaluation", "random", "none")
PICTURES = (".jpg", ".jpeg", ".png")  # WebP is too small for many rows

_SETTINGS = "[KEY VALUE | KEY=VALUE ...]"
_FILE_AND_SETTINGS = f"[--config_file FILE] {_SETTINGS}"
_TOP_LEVEL = {key.partition(".")[0] for key in SETTINGS}


class Parser(argparse.ArgumentParser):
    """Says a wrong argument as any wrong setting: in one sentence, once for all ranks."""

    def __init__(self, form: str, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False)
        self._form = form

    def error(self, message: str) -> NoReturn:
        # argparse has made a text of its own error by now, in which the argument's name comes first.
        named = re.search(r"(?<!\S)-{1,2}\w[\w-]*|\b(FOLDER|IMAGE)\b", message)
        key = named[0] if named else None
        raise SettingsError(f"the command line must be {self._form}, got: {message}; correct it", key=key)


@dataclass(frozen=True)
class Command:
    """One of the commands.

    Attributes:
        form: how its command line looks, for the error.
        add_arguments: its own arguments; they reach the story under their names.
        fixed: settings that hold whatever the user says.
        one_process: whether it can only be started alone.
    """

    form: str = _FILE_AND_SETTINGS
    add_arguments: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    fixed: tuple[str, ...] = ()
    one_process: bool = False


@dataclass(frozen=True)
class Words:
    """A command line, taken apart.

    Attributes:
        config_file: the YAML file with settings, if one is named.
        overrides: the settings over those of the file.
        own: the command's own arguments by name.
    """

    config_file: str | None
    overrides: list[str]
    own: dict[str, Any]


def read_words(story: str, description: str, words: Sequence[str] | None = None) -> Words:
    """The command line of a story; `words` is None for this process's.

    Raises:
        SettingsError: it has another form.
    """
    command = COMMANDS[story]
    parser = Parser(command.form, description)
    if "--config_file" in command.form:
        parser.add_argument("--config_file", "--config-file", metavar="FILE", help="YAML file with settings")
    command.add_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE | KEY=VALUE", help="settings over those of the file")
    own = vars(parser.parse_intermixed_args(words))
    overrides = own.pop("overrides")
    if "folder" in own and (not own["folder"] or _is_setting(own["folder"])):
        parser.error("no FOLDER")
    if "images" in own:  # any number of names: the settings stand behind them
        own["images"], overrides = _split(own["images"])
        if not own["images"]:
            parser.error("no IMAGE")
    return Words(own.pop("config_file", None), overrides, own)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Names, and from the first key on the settings."""
    start = next((place for place, word in enumerate(words) if _is_setting(word)), len(words))
    return words[:start], words[start:]


def _is_setting(word: str) -> bool:
    """Whether a key begins here, be it a wrong one; ./TEST.JPG is none."""
    return word.partition("=")[0].partition(".")[0] in _TOP_LEVEL


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=_formats, default=FORMATS, metavar="LIST", help=",".join(FORMATS))
    parser.add_argument("--output", metavar="FOLDER", help="for the files; by default that of TEST.WEIGHT")
    parser.add_argument("--check", choices=CHECKS, default=CHECKS[0], help="what is compared with the model itself")
    parser.add_argument("--uint8", action="store_true", help="take uint8 [B, H, W, 3] and normalise inside the model")


def _embed_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", default="", metavar="FOLDER", help="of images, with all folders in it")
    parser.add_argument("--output", metavar="OUT", help="by default OUTPUT_DIR/galleries/ and the name of FOLDER")
    parser.add_argument("--strict", action="store_true", help="an image that cannot be read is an error")


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="to look for")
    parser.add_argument("--gallery", required=True, metavar="OUT", help="a folder that launch/embed.py wrote")
    parser.add_argument("--top", type=at_least_one, default=10, metavar="K", help="how many to find, by default 10")
    parser.add_argument("--output", type=_picture, default="search.jpg", metavar="FILE", help="a picture of them")
    parser.add_argument("--json", metavar="FILE", help="the same to be read by programs")


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=at_least_one, default=1, metavar="N", help="that the job has")
    parser.add_argument("--ranks_per_node", type=at_least_one, default=1, metavar="R", help="processes on each")


def _formats(word: str) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in word.split(",") if part.strip())
    if not chosen or not set(chosen) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"{word!r} is no list of {','.join(FORMATS)}")
    return chosen


def at_least_one(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number >= 1")
    return int(word)


def _picture(word: str) -> str:
    if not word.lower().endswith(PICTURES):
        raise argparse.ArgumentTypeError(f"{word!r} does not end in one of {', '.join(PICTURES)}")
    return word


COMMANDS = {
    "train": Command(),
    "evaluate": Command(),
    "check": Command(),
    "plan": Command(f"[--nodes N] [--ranks_per_node R] {_FILE_AND_SETTINGS}", _plan_arguments),
    "export": Command(
        f"[--to LIST] [--output FOLDER] [--check {'|'.join(CHECKS)}] [--uint8] {_FILE_AND_SETTINGS}",
        _export_arguments,
        # The exported model computes in float32; what it is compared with must do so too.
        fixed=("MODEL.DEVICE=cpu", "SOLVER.PRECISION=fp32", "SOLVER.SHARDING=none"),
        one_process=True,
    ),
    "embed": Command(f"FOLDER [--output OUT] [--strict] {_FILE_AND_SETTINGS}", _embed_arguments),
    "search": Command(
        f"IMAGE ... --gallery OUT [--top K] [--output FILE] [--json FILE] {_SETTINGS}",
        _search_arguments,
        one_process=True,
    ),
}
