"""The command `convert`: extract the weights of a pickled model without running code of the file.

Ignite 0.1.2, which reid-strong-baseline pins, saves live objects. Loading such a file imports its classes and calls
whatever it names. Here an inert object that keeps its state replaces every class and function of the file, and the
weights are read from that state.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch._utils import _rebuild_parameter, _rebuild_tensor, _rebuild_tensor_v2

from reid.checkpoints.save import save_atomically
from reid.checkpoints.state_dicts import is_optimizer, likely_backbone
from reid.errors import WorldError
from reid.process.logs import set_up_console
from reid.process.side_effects import first_line

logger = logging.getLogger(__name__)


class _Inert:
    """Replacement for any class or function that the file names; it only keeps its state."""

    origin = ""  # name in the file
    state: Any = None
    dump_patches = False  # read by torch if the source code of the class differs from the file's

    def __init__(self, *arguments: Any, **options: Any) -> None:
        del arguments, options

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def _do_nothing(self, *arguments: Any) -> None:
        del arguments

    append = extend = add = __setitem__ = _do_nothing

    def __call__(self, *arguments: Any) -> _Inert:
        del arguments
        return _Inert()


# All that a file can name. None of it calls its arguments.
_REAL: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    **{(module, "set"): set for module in ("builtins", "__builtin__")},  # the latter in protocol 2
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch.nn.parameter", "Parameter"): nn.Parameter,
    ("torch", "Size"): torch.Size,
    **{
        ("torch", f"{kind}Storage"): getattr(torch, f"{kind}Storage")
        for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
    },
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        real = _REAL.get((module_name, global_name))
        return real or type(global_name, (_Inert,), {"origin": f"{module_name}.{global_name}"})


class _RestrictedPickle:
    """Replacement for the module `pickle` in torch.load."""

    __name__ = "restricted pickle"
    Unpickler = _RestrictedUnpickler

    @staticmethod
    def load(file: IO[bytes], **options: Any) -> Any:
        return _RestrictedUnpickler(file, **options).load()


def extract_weights(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Return the class name and the state dict of the model in a file.

    Args:
        path: Path of a file that torch.save wrote, in its present format or in that before PyTorch 1.6.

    Raises:
        WorldError: The file is missing, damaged, or does not hold a model.
    """
    if not path.is_file():
        raise _invalid(path, "which does not exist", "correct the path")
    try:
        _reject_other_archives(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about classes whose source code is missing
            content = torch.load(path, map_location="cpu", pickle_module=_RestrictedPickle(), weights_only=False)
        return _model_in(content, path)
    except WorldError:
        raise
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        reason = (first_line(error) or type(error).__name__).rstrip(".")
        raise _invalid(path, f"which is damaged or of another format ({reason})") from error


def _invalid(path: Path, got: str, fix: str = "give another file") -> WorldError:
    return WorldError(f"IN must hold a model that torch.save wrote, got {path}, {got}. Fix: {fix}.", key="IN")


def _reject_other_archives(path: Path) -> None:
    """Raise for archives that torch.load reads without the given unpickler."""
    is_scripted = False
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            is_scripted = any(Path(name).name == "constants.pkl" for name in archive.namelist())
    if is_scripted or tarfile.is_tarfile(path):
        raise _invalid(path, "TorchScript" if is_scripted else "an archive of PyTorch 0.1")


def _model_in(content: Any, path: Path) -> tuple[str, dict[str, Tensor]]:
    name, state = "", content
    if isinstance(content, _Inert):
        name, state = content.origin, content.state
    if isinstance(state, dict) and ("param_groups" in state or is_optimizer(state)):
        raise _invalid(path, f"an optimizer ({name or 'state dict'})", "give the file of the model, NAME_model_N.pth")
    if isinstance(content, _Inert) and isinstance(state, dict) and "_modules" in state:
        return name, {key.removeprefix("module."): value for key, value in _entries(content)}
    if isinstance(content, dict):
        for key in ("model", "state_dict"):
            if isinstance(content.get(key), _Inert | dict):
                return _model_in(content[key], path)
        entries = {key: value for key, value in content.items() if isinstance(value, Tensor) and isinstance(key, str)}
        if entries:
            return "state dict", {key.removeprefix("module."): value.clone() for key, value in entries.items()}
    raise _invalid(path, f"content of type {name or type(content).__name__}")


def _entries(module: _Inert, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the entries that the module's state_dict() would have."""
    state = module.state if isinstance(module.state, dict) else {}
    skipped = state.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, value in (state.get(kind) or {}).items():
            if isinstance(value, Tensor) and name not in skipped:
                yield f"{prefix}{name}", value.detach().clone()
    for name, child in (state.get("_modules") or {}).items():
        if isinstance(child, _Inert):
            yield from _entries(child, f"{prefix}{name}.")


def convert(source: Path, target: Path) -> None:
    """Write the weights of one file to another, as a plain state dict.

    Raises:
        WorldError: The source does not hold a model, or the target exists or cannot be written.
    """
    if target.exists():
        raise WorldError(
            f"OUT must be a new file, got {target}, which exists. Fix: choose another name or folder.", key="OUT"
        )
    name, state = extract_weights(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(target, state, key="OUT")
    backbone, classifier = likely_backbone(state), state.get("classifier.weight")
    logger.info(
        "%s: state dict with %d entries of %s (MODEL.NAME %s%s), for MODEL.PRETRAIN_PATH and TEST.WEIGHT",
        target,
        len(state),
        name,
        backbone or "unknown",
        f", {len(classifier)} identities" if classifier is not None else "",
    )


def main() -> int:
    """Run launch/convert.py; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", type=Path, help="file that torch.save wrote, as NAME_model_N.pth")
    parser.add_argument("target", metavar="OUT", type=Path, help="new file; keep the name to resume after epoch N")
    arguments = parser.parse_args()
    set_up_console()
    try:
        convert(arguments.source, arguments.target)
    except WorldError as error:
        logger.error("error: %s", error)
        return 1
    return 0
