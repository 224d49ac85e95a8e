"""Where a measurement runs: clocks, memory and graphs of this processor or of a CUDA device.

Everything that only a GPU has stands here, so that the code around it runs on both.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], Any]
_QUERY = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "power.draw", "power.limit",
    "temperature.gpu", "memory.total",
)  # fmt: skip
_L2_FLUSH = 256 * 2**20  # bytes, several times any L2


class Cpu:
    """This processor, with stand-ins for what it has not: graphs, streams, launches."""

    name = "cpu"
    graphs = False

    def describe(self) -> dict:
        """What :mod:`machine` does not know of the device."""
        return {}

    def memory(self) -> int:
        """Bytes that contestants may plan with: most of what is free now."""
        file = Path("/proc/meminfo")
        text = file.read_text() if file.exists() else ""
        found = re.search(r"MemAvailable:\s+(\d+) kB", text)
        return int(0.8 * 1024 * int(found[1])) if found else 2**62

    def synchronize(self) -> None:
        """Wait for the device."""

    def seconds(self, work: Work) -> float:
        """Time of ``work`` on the device; its caches hold nothing of it before."""
        return self.wall(work)

    def wall(self, work: Work) -> float:
        """Time of ``work`` by the host's clock, the device having finished."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def peak(self, work: Work) -> int | None:
        """Bytes allocated beyond those that were, at the worst moment; ``None``: not known."""
        work()
        return None

    def launches(self, work: Work) -> list[tuple[str, int, float]] | None:
        """Kernels of ``work``: name, how often, microseconds in all; ``None``: not known."""
        work()
        return None

    def side_stream(self) -> Any:
        """A scope whose work runs beside the default stream, in order with what is around it."""
        return contextlib.nullcontext()

    def keep_busy(self) -> None:
        """Delay what follows on the current stream by some milliseconds."""

    def unsynchronized(self) -> Any:
        """A scope in which waiting for the device is an error."""
        return contextlib.nullcontext()

    def capture(self, work: Work) -> tuple[Work, Any]:
        """A function that replays ``work``, and what ``work`` returned: replays overwrite it."""
        return work, work()


class _SideStream:
    def __enter__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        self.scope = torch.cuda.stream(self.stream)
        self.scope.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.scope.__exit__(*error)
        torch.cuda.current_stream().wait_stream(self.stream)


class Cuda(Cpu):
    """The current CUDA device."""

    name = "cuda"
    graphs = True

    def __init__(self) -> None:
        self._flush: torch.Tensor | None = None

    def describe(self) -> dict:
        properties = torch.cuda.get_device_properties(0)
        found = {
            "device": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                answer = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
                values = [value.strip() for value in answer.split("\n")[0].split(",")]
                found["nvidia-smi"] = dict(zip(_QUERY, values, strict=False))
        return found

    def memory(self) -> int:
        torch.cuda.empty_cache()
        return int(0.9 * torch.cuda.mem_get_info()[0])

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, work: Work) -> float:
        if self._flush is None:
            self._flush = torch.empty(_L2_FLUSH, dtype=torch.uint8, device="cuda")
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()  # meanwhile the host issues the first launches
        begin.record()
        work()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end)

    def peak(self, work: Work) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def launches(self, work: Work) -> list[tuple[str, int, float]] | None:
        torch.cuda.synchronize()
        # with the host's part: kernels alone go unreported in some versions
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profile:
            work()
            torch.cuda.synchronize()
        found: dict[str, tuple[int, float]] = {}
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                count, total = found.get(event.name, (0, 0.0))
                found[event.name] = count + 1, total + event.device_time_total
        ordered = sorted(found.items(), key=lambda item: -item[1][1])
        # nothing: the profiler does not work here, for every work launches something
        return [(name[:120], count, total) for name, (count, total) in ordered] or None

    def side_stream(self) -> Any:
        return _SideStream()

    def keep_busy(self) -> None:
        torch.cuda._sleep(20_000_000)  # cycles

    @contextlib.contextmanager
    def unsynchronized(self) -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def capture(self, work: Work) -> tuple[Work, Any]:
        with _SideStream():  # as graphs ask for: lazy initialisation happens outside of them
            for _ in range(3):
                work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = work()
        return graph.replay, result


CPU = Cpu()


def of(name: str) -> Cpu:
    """The device called ``"cpu"`` or ``"cuda"``."""
    return CPU if name == "cpu" else Cuda()
