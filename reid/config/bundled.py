"""Configuration files that are installed with the package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def find_config_file(name: str | Path) -> Path:
    """Return the file of this name; if there is none, the bundled one: softmax_triplet.yml, configs/demo.yml."""
    path = Path(name)
    if path.exists() or path.is_absolute():
        return path
    inner = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    # In a wheel configs/ is inside the package; in a clone it is beside it.
    bundled = (folder / "configs" / inner for folder in (_PACKAGE, _PACKAGE.parent))
    return next((file for file in bundled if file.is_file()), path)
