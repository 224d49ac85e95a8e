"""``fastcl check``: does every backend agree with the float64 reference on this machine?"""

from __future__ import annotations

from .ops import backends
from .testing import compare, quick_cases, served


def main() -> int:
    """Print a table of worst errors per backend, operation and dtype; 1 if any is too large."""
    print(f"{'backend':<11}{'operation':<14}{'dtype':<10}{'error':>9}{'plain':>9}{'allowed':>9}")
    breaches = 0
    for name, backend in backends().items():
        if name == "reference":
            continue
        if backend.unavailable:
            print(f"{name:<11}not here: {backend.unavailable}")
            continue
        for operation, dtype in served(name):
            verdicts = [
                compare(name, operation, shape, data, rule, temperature, dtype)
                for shape, data, rule, temperature in quick_cases()
            ]
            worst = max(verdicts, key=lambda v: v.error / v.allowed)
            breaches += not worst.passed
            label = str(dtype).removeprefix("torch.")
            print(
                f"{name:<11}{operation:<14}{label:<10}{worst.error:9.1e}{worst.plain:9.1e}"
                f"{worst.allowed:9.1e}{'' if worst.passed else '   BREACH'}"
            )
    print(f"{breaches} breaches" if breaches else "every backend agrees with the reference")
    return 1 if breaches else 0
