"""Command lines: the arguments of each command, followed by settings."""

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
PICTURES = (".jpg", ".jpeg", ".png")  # WebP limits the height to 16,383 pixels, which many rows exceed

_SETTINGS = "[KEY VALUE | KEY=VALUE ...]"
_FILE_AND_SETTINGS = f"[--config_file FILE] {_SETTINGS}"
_TOP_LEVEL = {key.partition(".")[0] for key in SETTINGS}


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are SettingsErrors, which are reported once for all ranks."""

    def __init__(self, form: str, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False)
        self._form = form

    def error(self, message: str) -> NoReturn:
        # The name of the argument comes first in argparse's message.
        named = re.search(r"(?<!\S)-{1,2}\w[\w-]*|\b(FOLDER|IMAGE)\b", message)
        key = named[0] if named else None
        raise SettingsError(f"the command line must be {self._form}, got: {message}; correct it", key=key)


@dataclass(frozen=True)
class Command:
    """Command line of one command.

    Attributes:
        description: First line of its help.
        form: Form of the command line, for errors.
        add_arguments: Function that adds the arguments of the command itself; it receives them under their names.
        fixed: Settings that the user cannot change.
        one_process: Whether the command runs as a single process only.
    """

    description: str
    form: str = _FILE_AND_SETTINGS
    add_arguments: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    fixed: tuple[str, ...] = ()
    one_process: bool = False


@dataclass(frozen=True)
class ParsedArguments:
    """Parsed command line of a command.

    Attributes:
        config_file: YAML file with settings, or None.
        overrides: Settings that override those of the file, as KEY VALUE or KEY=VALUE.
        command_args: Arguments of the command itself, by name.
    """

    config_file: str | None
    overrides: list[str]
    command_args: dict[str, Any]


def parse_arguments(name: str, arguments: Sequence[str] | None = None) -> ParsedArguments:
    """Parse the command line of a command.

    Args:
        name: Key of COMMANDS.
        arguments: Arguments; None for those of this process.

    Raises:
        SettingsError: The command line has another form.
    """
    command = COMMANDS[name]
    parser = Parser(command.form, command.description)
    if "--config_file" in command.form:
        parser.add_argument("--config_file", "--config-file", metavar="FILE", help="YAML file with settings")
    command.add_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE | KEY=VALUE", help="settings over those of the file")
    parsed = vars(parser.parse_intermixed_args(arguments))
    overrides = parsed.pop("overrides")
    if "folder" in parsed and (not parsed["folder"] or _starts_setting(parsed["folder"])):
        parser.error("no FOLDER")
    if "images" in parsed:  # any number of files, followed by settings
        parsed["images"], overrides = _split(parsed["images"])
        if not parsed["images"]:
            parser.error("no IMAGE")
    return ParsedArguments(parsed.pop("config_file", None), overrides, parsed)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split into file names, and the settings from the first key on."""
    start = next((index for index, argument in enumerate(arguments) if _starts_setting(argument)), len(arguments))
    return arguments[:start], arguments[start:]


def _starts_setting(argument: str) -> bool:
    """Return whether an argument starts with the name of a section, even of an unknown key; ./TEST.JPG does not."""
    return argument.partition("=")[0].partition(".")[0] in _TOP_LEVEL


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=_formats, default=FORMATS, metavar="LIST", help=",".join(FORMATS))
    parser.add_argument("--output", metavar="FOLDER", help="folder for the files; default: the folder of TEST.WEIGHT")
    parser.add_argument("--check", choices=CHECKS, default=CHECKS[0], help="data to compare with the model on")
    parser.add_argument("--uint8", action="store_true", help="take uint8 [B, H, W, 3] and normalize inside the model")


def _embed_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", default="", metavar="FOLDER", help="folder of images, recursive")
    parser.add_argument("--output", metavar="OUT", help="folder for the gallery; default: OUTPUT_DIR/galleries/FOLDER")
    parser.add_argument("--strict", action="store_true", help="an image that cannot be read is an error")


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image to search for")
    parser.add_argument("--gallery", required=True, metavar="OUT", help="folder that the command embed wrote")
    parser.add_argument("--top", type=at_least_one, default=10, metavar="K", help="number of results, default: 10")
    parser.add_argument(
        "--output",
        type=_picture,
        default="search.jpg",
        metavar="FILE",
        help="picture of the results",
    )
    parser.add_argument("--json", metavar="FILE", help="the results as JSON")


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=at_least_one, default=1, metavar="N", help="nodes of the job, default: 1")
    parser.add_argument(
        "--ranks_per_node", type=at_least_one, default=1, metavar="R", help="ranks of a node, default: 1"
    )


def _formats(argument: str) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in argument.split(",") if part.strip())
    if not chosen or not set(chosen) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"{argument!r} is not a list of {','.join(FORMATS)}")
    return chosen


def at_least_one(argument: str) -> int:
    if not argument.isdecimal() or int(argument) < 1:
        raise argparse.ArgumentTypeError(f"{argument!r} is not a whole number >= 1")
    return int(argument)


def _picture(argument: str) -> str:
    if not argument.lower().endswith(PICTURES):
        raise argparse.ArgumentTypeError(f"{argument!r} does not end in one of {', '.join(PICTURES)}")
    return argument


COMMANDS = {
    "train": Command("Train a model and evaluate it; resumes if it was interrupted."),
    "evaluate": Command("Evaluate a checkpoint."),
    "check": Command("Check ranks, network, data, disk and speed; exit code 0: no problems, 1: problems."),
    "plan": Command(
        "Print the number of nodes that a training uses, and its OUTPUT_DIR.",
        f"[--nodes N] [--ranks_per_node R] {_FILE_AND_SETTINGS}",
        _plan_arguments,
    ),
    "export": Command(
        "Write a trained model for other programs, compared with the model itself.",
        f"[--to LIST] [--output FOLDER] [--check {'|'.join(CHECKS)}] [--uint8] {_FILE_AND_SETTINGS}",
        _export_arguments,
        # The exported model computes in float32, so the model that it is compared with must too.
        fixed=("MODEL.DEVICE=cpu", "SOLVER.PRECISION=fp32", "SOLVER.SHARDING=none"),
        one_process=True,
    ),
    "embed": Command(
        "Write the embeddings of all images in a folder, as a gallery to search in.",
        f"FOLDER [--output OUT] [--strict] {_FILE_AND_SETTINGS}",
        _embed_arguments,
    ),
    "search": Command(
        "Find the images of a gallery that are nearest to given ones, and draw them.",
        f"IMAGE ... --gallery OUT [--top K] [--output FILE] [--json FILE] {_SETTINGS}",
        _search_arguments,
        one_process=True,
    ),
}
