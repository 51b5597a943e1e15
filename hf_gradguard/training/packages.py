"""Data files of installed packages, by path: the packages themselves are never imported."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path


def data_file(package: str, name: str, install: str) -> Path:
    """A file or folder of a package.

    Args:
        package: the distribution.
        name: the path within it.
        install: the command that installs it.

    Raises:
        ValueError: it is not installed, or holds no such file; the message says how to install it.
    """
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise ValueError(f"the package {package!r} is not installed: {install}") from None
    path = Path(str(distribution.locate_file(name)))
    if not path.exists():
        raise ValueError(f"{package} {distribution.version} holds no {name}; one that does: {install}")
    return path
