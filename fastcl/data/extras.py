"""One clear sentence when an optional dependency is missing."""

from __future__ import annotations

from importlib.util import find_spec


def require(*modules: str, extra: str = "train", user: str = "this part of fastcl") -> None:
    """Check that every module of an extra can be found, without importing any.

    Args:
        modules: top-level import names, e.g. ``"lightning"``.
        extra: the extra of the fastcl package that installs them.
        user: what needs them, for the message.

    Raises:
        ModuleNotFoundError: naming the extra and every missing module at once.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{user} needs the extra '{extra}': pip install 'fastcl[{extra}]' "
            f"(missing: {', '.join(missing)})"
        )
