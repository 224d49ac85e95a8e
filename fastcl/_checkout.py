"""Let a source checkout that is not installed find ``fastcl.kernels`` in its folder ``kernels``.

A wheel holds ``fastcl/kernels`` itself and an editable install maps it, so there this does
nothing; it serves plain use of the checkout only.
"""

import importlib.util
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_KERNELS = _PACKAGE.parent / "kernels"


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "fastcl.kernels":
            return None
        return importlib.util.spec_from_file_location(
            name, _KERNELS / "__init__.py", submodule_search_locations=[str(_KERNELS)]
        )


def install() -> None:
    """Register the finder where the package is a bare checkout."""
    in_checkout = (_PACKAGE.parent / "setup.py").is_file() and (_KERNELS / "__init__.py").is_file()
    if in_checkout and not (_PACKAGE / "kernels").is_dir():
        # first, so that no other checkout's editable install answers for this one
        sys.meta_path.insert(0, _Finder)
