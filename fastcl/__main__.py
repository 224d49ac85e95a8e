"""``python -m fastcl``, the same as ``fastcl``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
