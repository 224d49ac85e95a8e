"""What every stage has: a device, a deadline, records that are written as they come, helpers."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

from .. import device, machine
from ..__main__ import fresh
from ..cases import Case
from ..contestants import fastcl_backends
from ..measure import differentiate, products, reason_of


class Stage:
    """One stage of the run.

    Attributes:
        name: of the stage and its file.
        device: where it measures.
        quick, toy: fewer cases; tiny ones through the interpreter.
        workers: processes at a time where several compile.
        wheel: the one to try, if not that in dist.
        failures: what went wrong, one line each.
    """

    def __init__(
        self, name: str, out: Path, seconds: float, quick: bool, toy: bool, workers: int,
        only: list[str] | None = None, wheel: Path | None = None,
    ):  # fmt: skip
        self.name, self.out, self.quick, self.toy, self.workers = name, out, quick, toy, workers
        self._only, self.wheel = only, wheel
        self.device = device.of("cpu" if toy else "cuda")
        self.failures: list[str] = []
        self._begun, self._end = time.time(), time.time() + seconds
        self._records: list[dict] = []
        self._skipped: list[str] = []
        self._machine = machine.describe(0) | {"toy": toy}
        self._before = self.device.describe()
        self._write()

    def chosen(self, things: Sequence, name: Callable[[Any], str] | None = None) -> list:
        """Those of ``things`` whose name holds one of the substrings asked for."""
        if self._only is None:
            return list(things)
        name = name or name_of
        return [thing for thing in things if any(part in name(thing) for part in self._only)]

    def left(self) -> float:
        """Seconds until nothing new may begin."""
        return self._end - time.time()

    def add(self, *records: dict) -> None:
        """Keep ``records`` and write the file; one with ``"failed"`` counts as a failure."""
        for record in records:
            self._records.append(record)
            if "failed" in record:
                what = record.get("case", record.get("kind"))
                self.failures.append(f"{what}: {record['failed']}")
                print(f"  FAILED {self.failures[-1]}", flush=True)
        self._write()

    def skip(self, what: str) -> None:
        """Say what time did not allow."""
        self._skipped.append(what)

    def each(self, things: Sequence, measure: Callable[[Any], dict], kind: str) -> None:
        """``measure`` one after the other as long as there is time; an error costs its record."""
        for thing in things:
            name = name_of(thing)
            if self.left() <= 0:
                self.skip(f"{kind} {name}")
                continue
            begin = time.time()
            try:
                record = measure(thing)
            except Exception as error:  # the next one may still go well
                record = {"failed": reason_of(error)}
                if fatal(error):
                    self._end = 0.0
            self.add({"kind": kind, "case": name, "took_s": time.time() - begin} | record)

    def parallel(self, groups: Sequence[tuple], function: Callable[..., list[dict]]) -> None:
        """Records of ``function(device name, seconds left, *group)``, each in a fresh process.

        A process that dies, as by a kernel's bad access, costs its group only.
        """
        with ThreadPoolExecutor(self.workers) as threads:
            jobs = {}
            for group in groups:
                work = partial(self._one, function, group)
                jobs[threads.submit(work)] = group
            for job in as_completed(jobs):
                title = " ".join(str(part) for part in jobs[job] if isinstance(part, str))
                try:
                    records = job.result()
                except BrokenProcessPool:
                    records = [{"case": title, "failed": "its process died"}]
                except Exception as error:
                    records = [{"case": title, "failed": reason_of(error)}]
                for record in records:
                    if "skipped" in record:
                        self.skip(record["skipped"])
                # at once: writing ten thousand one by one would take longer than making them
                self.add(*(record for record in records if "skipped" not in record))

    def _one(self, function: Callable, group: tuple) -> list[dict]:
        if self.left() <= 0:
            return [{"skipped": " ".join(str(part) for part in group if isinstance(part, str))}]
        return fresh("spawn", function, self.device.name, self.left(), *group)

    def warm(self, cases: Sequence[Case], backend: str = "triton") -> None:
        """Compile what ``cases`` launch, into Triton's cache on disk, in many processes."""
        begin, alike = time.time(), {}
        for case in cases:  # what shares code is one process, so that nothing is compiled twice
            alike.setdefault((case.task, case.width, case.dtype), []).append(case)
        kinds = list(alike.values())
        shares = [
            tuple(case for kind in kinds[i :: self.workers] for case in kind)
            for i in range(min(self.workers, len(kinds)))
        ]
        self.parallel([(share, backend) for share in shares], _step_once)
        self.add({"kind": "warm", "case": f"{len(cases)} cases", "took_s": time.time() - begin})

    def close(self) -> None:
        """Write how it ended."""
        self._write(ended=True)

    def _write(self, ended: bool = False) -> None:
        found = {
            "stage": self.name,
            "machine": self._machine,
            "device_before": self._before,
            "quick": self.quick,
            "only": self._only,
            "seconds": time.time() - self._begun,
            "ended": ended,
            "failures": self.failures,
            "skipped_for_time": self._skipped,
            "records": self._records,
        }
        if ended:
            found["device_after"] = self.device.describe()
        partial_file = self.out / f"{self.name}.partial"
        partial_file.write_text(json.dumps(found, indent=1, default=str) + "\n")
        partial_file.replace(self.out / f"{self.name}.json")


def name_of(thing: Any) -> str:
    """What a case, a target or a string is called."""
    return str(getattr(thing, "name", thing))


def fatal(error: Exception) -> bool:
    """Whether nothing runs on the device any more in this process."""
    return bool(re.search("illegal|misaligned|unspecified launch|device-side assert", str(error)))


def _step_once(device_name: str, seconds: float, cases: tuple[Case, ...], backend: str) -> list:
    """Forward and backward of every case, for the compiler's sake."""
    end, (contestant,) = time.time() + seconds, fastcl_backends((backend,))
    for case in cases:
        if time.time() > end:
            break
        # what fails here fails again where it is measured, and is recorded there
        with contextlib.suppress(Exception), products(case.dtype):
            step = contestant.builders[case.task](case)
            differentiate(step, contestant, case.inputs(device_name))
    return []


def summarize(out: Path, only: str | None = None) -> str:
    """Tables of every stage whose file is in ``out``, written to summary.txt; the text of one."""
    texts = {}
    for file in sorted(out.glob("*.json")):
        found = json.loads(file.read_text())
        if "stage" not in found:
            continue
        module = importlib.import_module(f".{found['stage']}", __package__)
        device_text = found["device_before"].get("device", found["machine"]["processor"])
        head = (
            f"== {found['stage']}: {device_text}, torch {found['machine']['torch']}, "
            f"{found['machine']['date']}, {found['seconds']:.0f} s"
            f"{'' if found['ended'] else ', STOPPED'}"
        )
        lines = [head, *module.lines(found["records"])]
        lines += [f"FAILED {failure}" for failure in found["failures"]]
        if found["skipped_for_time"]:
            lines.append(f"no time for {len(found['skipped_for_time'])}:")
            lines += [f"  {what}" for what in found["skipped_for_time"][:20]]
        texts[found["stage"]] = "\n".join(lines)
    (out / "summary.txt").write_text("\n\n".join(texts.values()) + "\n")
    return texts.get(only, "") if only else "\n\n".join(texts.values())
