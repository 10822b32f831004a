"""Which packages are installed, read without importing them."""

from __future__ import annotations

import importlib.metadata


def installed_version(name: str) -> str | None:
    """The version of an installed package; None where it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_versions(*names: str) -> dict[str, str]:
    """Versions of packages; "absent" for those that are not installed."""
    return {name: installed_version(name) or "absent" for name in names}
