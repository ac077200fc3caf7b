"""The weights of a whole model that torch.save has pickled, taken out without running anything of the file's.

Ignite 0.1.2, which reid-strong-baseline pins, saves live objects. Loading such a file imports its classes and calls
what it names, which may be anything. Here a class or function of the file is never looked up: something inert stands in
for it, which keeps what it is given, and the weights are read from that.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import sys
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

from reid.checkpoint_files import save_atomically
from reid.errors import WorldError
from reid.layouts import is_optimizer, likely_backbone
from reid.logs import Console

logger = logging.getLogger("reid.conversion")


class _Inert:
    """Stands for whatever the file names; keeps the state that it is given, and does nothing else."""

    origin = ""  # what the file calls it
    state: Any = None
    dump_patches = False  # what torch asks of a class whose source code is another than in the file

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


# All that a file can reach. None of it calls anything that it is given.
_REAL: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    **{(module, "set"): set for module in ("builtins", "__builtin__")},  # the latter is how protocol 2 calls it
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
    """What torch.load takes in place of the module `pickle`."""

    __name__ = "restricted pickle"
    Unpickler = _RestrictedUnpickler

    @staticmethod
    def load(file: IO[bytes], **options: Any) -> Any:
        return _RestrictedUnpickler(file, **options).load()


def weights_in(path: Path) -> tuple[str, dict[str, Tensor]]:
    """What a file holds, as its author calls it, and the state dict of that.

    Args:
        path: of a file in torch.save's present format or in that of before PyTorch 1.6.

    Raises:
        WorldError: there is no such file, it is damaged, or holds no model.
    """
    if not path.is_file():
        raise WorldError(
            f"IN must be a file that torch.save has written, but there is none at {path}; correct the path", key="IN"
        )
    try:
        _refuse_other_archives(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes whose source code is not at hand
            content = torch.load(path, map_location="cpu", pickle_module=_RestrictedPickle(), weights_only=False)
        return _model_in(content, path)
    except WorldError:
        raise
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WorldError(
            f"IN={path} cannot be read as a file of torch.save's, it is damaged or none: {reason}; give another file",
            key="IN",
        ) from error


def _refuse_other_archives(path: Path) -> None:
    """Those that torch.load would not read with the unpickler that it is given."""
    scripted = False
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            scripted = any(Path(name).name == "constants.pkl" for name in archive.namelist())
    if scripted or tarfile.is_tarfile(path):
        what = "TorchScript" if scripted else "an archive of PyTorch 0.1"
        raise WorldError(
            f"IN={path} must be a file that torch.save has written, and it is {what}; give another file", key="IN"
        )


def _model_in(content: Any, path: Path) -> tuple[str, dict[str, Tensor]]:
    what, held = "", content
    if isinstance(content, _Inert):
        what, held = content.origin, content.state
    if isinstance(held, dict) and ("param_groups" in held or is_optimizer(held)):
        raise WorldError(
            f"IN={path} must hold a model, and it holds an optimiser, {what or 'its state'}, which is not taken over: "
            "training goes on with a new one; give the file with the model, NAME_model_N.pth",
            key="IN",
        )
    if isinstance(content, _Inert) and isinstance(held, dict) and "_modules" in held:
        return what, {name.removeprefix("module."): value for name, value in _entries(content)}
    if isinstance(content, dict):
        for key in ("model", "state_dict"):
            if isinstance(content.get(key), _Inert | dict):
                return _model_in(content[key], path)
        state = {name: value for name, value in content.items() if isinstance(value, Tensor) and isinstance(name, str)}
        if state:
            return "state dict", {name.removeprefix("module."): value.clone() for name, value in state.items()}
    raise WorldError(f"IN={path} must hold a model, got {what or type(content).__name__}; give another file", key="IN")


def _entries(module: _Inert, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names and values as the module's own state_dict() would give them."""
    state = module.state if isinstance(module.state, dict) else {}
    left_out = state.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, value in (state.get(kind) or {}).items():
            if isinstance(value, Tensor) and name not in left_out:
                yield f"{prefix}{name}", value.detach().clone()
    for name, child in (state.get("_modules") or {}).items():
        if isinstance(child, _Inert):
            yield from _entries(child, f"{prefix}{name}.")


def convert(source: Path, target: Path) -> None:
    """Writes the weights in one file to another, as a plain state dict.

    Raises:
        WorldError: the source holds no model, or the target is there already or cannot be written.
    """
    if target.exists():
        raise WorldError(
            f"OUT must be a new file, but there is one at {target}; choose another name or folder", key="OUT"
        )
    what, state = weights_in(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(target, state, key="OUT")
    backbone, classifier = likely_backbone(state), state.get("classifier.weight")
    logger.info(
        "%s: %d entries of a %s (MODEL.NAME %s%s), a state dict that MODEL.PRETRAIN_PATH and TEST.WEIGHT take",
        *(target, len(state), what, backbone or "not known"),
        f", {len(classifier)} identities" if classifier is not None else "",
    )


def main() -> int:
    """The command line's two file names to a new file; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", type=Path, help="what torch.save has written, as NAME_model_N.pth")
    parser.add_argument("target", metavar="OUT", type=Path, help="the new file; keep the name to go on behind epoch N")
    arguments = parser.parse_args()
    logging.basicConfig(handlers=[Console(sys.stdout)], level=logging.INFO, format="%(message)s")
    try:
        convert(arguments.source, arguments.target)
    except WorldError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0
