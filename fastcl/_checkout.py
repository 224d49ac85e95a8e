"""Let a source checkout that is not installed find the packages whose folders lie beside fastcl's.

``fastcl.kernels`` is the folder ``kernels``, ``fastcl.benchmarks`` the folder ``benchmarks``. A
wheel holds both inside ``fastcl``, and there this does nothing.
"""

import importlib.util
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_FOLDERS = {f"fastcl.{name}": _PACKAGE.parent / name for name in ("kernels", "benchmarks")}


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        folder = _FOLDERS.get(name)
        if folder is None or not (folder / "__init__.py").is_file():
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def install() -> None:
    """Register the finder where the package is a bare checkout."""
    if (_PACKAGE.parent / "setup.py").is_file() and not (_PACKAGE / "kernels").is_dir():
        # first, so that no other checkout's editable install answers for this one
        sys.meta_path.insert(0, _Finder)
