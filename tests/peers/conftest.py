"""Tests beside the installed libraries, run by ``make test-peers`` in an environment of their own.

They are not collected elsewhere: what they need is larger than everything else together.
"""

import os

collect_ignore_glob = [] if os.environ.get("FASTCL_PEERS") else ["test_*.py"]
