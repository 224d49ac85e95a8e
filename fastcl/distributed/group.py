"""Exchanges between the ranks of a process group; one that fails names the rank at fault."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed these two
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_STORE_PATIENCE = 5.0  # seconds for one answer of the store, which may have died with its host
_GRACE = 1.0  # seconds for the others to report that they are here
_ROLL_CALL = 5.0  # seconds by which the ranks' time-outs may lie apart
_PROBE_TAG = 0x7FC1


class Pending:
    """An exchange under way; ``wait()`` gives what arrived."""

    def __init__(self, group: Group, operation: str, works: list, sent: list, arriving: list):
        self._group, self._operation, self._works = group, operation, works
        self._sent = sent  # kept alive until they have left
        self._arriving = arriving

    def wait(self) -> list[Tensor]:
        with self._group.naming(self._operation):
            for work in self._works:
                work.wait()
        self._sent = []
        return self._arriving


class Group:
    """The ranks of a process group and what they do together."""

    def __init__(self, process_group: dist.ProcessGroup | None):
        handle = dist.group.WORLD if process_group is None else process_group
        assert handle is not None
        self.handle = handle
        self.rank = dist.get_rank(self.handle)
        self.size = dist.get_world_size(self.handle)
        if self.rank < 0:
            raise ValueError("process_group does not contain this rank; expected one that does")

    def all_gather(self, x: Tensor, operation: str) -> Pending:
        """``x`` of every rank, equal shapes: [W, *x.shape]."""
        x = x.contiguous()
        out = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        with self.naming(operation):
            work = _all_gather(out, x, group=self.handle, async_op=True)
        return Pending(self, operation, [work], [x], [out.view(self.size, *x.shape)])

    def reduce_scatter(self, x: Tensor, operation: str) -> Tensor:
        """The sum over ranks of ``x[rank]``, for x of [W, ...]."""
        out = torch.empty_like(x[0])
        with self.naming(operation):
            _reduce_scatter(out, x.flatten(0, 1), group=self.handle)
        return out

    def all_to_all(self, parts: list[Tensor], sizes: list[int], operation: str) -> list[Tensor]:
        """Part s goes to rank s; from rank s come ``sizes[s]`` rows."""
        sent = torch.cat(parts)
        out = sent.new_empty((sum(sizes), *sent.shape[1:]))
        with self.naming(operation):
            dist.all_to_all_single(
                out, sent, sizes, [len(part) for part in parts], group=self.handle
            )
        return list(out.split(sizes))

    def all_reduce(self, x: Tensor, operation: str) -> Tensor:
        """The sum over ranks."""
        x = x.clone()
        with self.naming(operation):
            dist.all_reduce(x, group=self.handle)
        return x

    def agree(self, rows: int, device: torch.device, operation: str, facts: dict) -> list[int]:
        """The number of rows on each rank, once all have come for the same thing.

        Args:
            rows: of this rank.
            device: the group's, for what is exchanged.
            operation: what the ranks have come for.
            facts: whatever else must be the same on all of them; of a tensor, that it is one.

        Raises:
            ValueError: the ranks disagree.
        """
        text = _describe({"come for": operation, **facts})
        digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
        mine = torch.tensor([rows, digest], device=device)
        heads = self.all_gather(mine, f"agreeing on {operation}").wait()[0].tolist()
        if len({digest for _, digest in heads}) > 1:
            texts: list = [None] * self.size
            with self.naming(f"agreeing on {operation}"):
                dist.all_gather_object(texts, text, group=self.handle)
            raise ValueError(_disagreement(texts))
        return [rows for rows, _ in heads]

    def shift(self, sent: list[Tensor], arriving: list[Tensor], by: int, operation: str) -> Pending:
        """Send to the rank ``by`` further on while the rank ``by`` before sends here."""
        to, source = (self.rank + by) % self.size, (self.rank - by) % self.size
        exchanges = [dist.P2POp(dist.isend, x, group=self.handle, group_peer=to) for x in sent] + [
            dist.P2POp(dist.irecv, x, group=self.handle, group_peer=source) for x in arriving
        ]
        with self.naming(operation):
            works = dist.batch_isend_irecv(exchanges)
        return Pending(self, operation, works, sent, arriving)

    # -------------------------------------------------------------------------- failures

    @contextlib.contextmanager
    def naming(self, operation: str) -> Iterator[None]:
        """Turn a failure of the backend into a sentence with the operation and the rank at fault.

        Raises:
            RuntimeError: that sentence.
        """
        try:
            yield
        except RuntimeError as error:  # what every backend raises, torch's own classes included
            raise RuntimeError(
                f"{operation} failed on rank {self.rank} of {self.size}: {self._at_fault()}"
            ) from error

    def _at_fault(self) -> str:
        """Who is at fault, as all ranks see it.

        gloo closes the connections of a rank that gives up waiting, so a closed connection alone
        proves nothing. Every rank reports in the group's store that it is here; who does not is
        at fault. The first to know leaves its verdict for those who look later.
        """
        store = self.handle.get_group_store()
        try:
            _in_time(lambda: store.set(f"fastcl/here/{self.rank}", "1"))
            started, silent = time.monotonic(), self._others()
            while True:
                silent = [
                    r for r in silent if not _in_time(lambda r=r: store.check([f"fastcl/here/{r}"]))
                ]
                waited = time.monotonic() - started
                # the silent whose connection is open may only not have noticed yet
                lost = silent if waited > _ROLL_CALL else []
                if _GRACE < waited <= _ROLL_CALL:
                    lost = self._closed(silent)
                verdict = f"{_ranks(lost)} ended or did not answer" if lost else ""
                if waited > _ROLL_CALL and not silent:
                    verdict = "every rank answers now"
                known = _in_time(lambda v=verdict: store.compare_set("fastcl/verdict", "", v))
                if known:
                    break
                time.sleep(0.1)
            self._let_others_read(store, silent)
            return known.decode()
        except (RuntimeError, TimeoutError):
            return "rank 0, which keeps the group's store, ended or did not answer"

    def _let_others_read(self, store, silent: list[int]) -> None:
        """The store may end with the first rank, so that one leaves last."""
        _in_time(lambda: store.set(f"fastcl/read/{self.rank}", "1"))
        readers = [f"fastcl/read/{rank}" for rank in self._others() if rank not in silent]
        deadline = time.monotonic() + _ROLL_CALL
        while self.rank == 0 and readers and time.monotonic() < deadline:
            if _in_time(lambda: store.check(readers)):
                break
            time.sleep(0.1)

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def _closed(self, ranks: list[int]) -> list[int]:
        """Those whose connection is closed: gloo refuses to even post a receive from them."""
        if dist.get_backend(self.handle) != "gloo":
            return []
        closed = []
        for rank in ranks:
            try:
                dist.irecv(torch.empty(1), group=self.handle, group_src=rank, tag=_PROBE_TAG)
            except RuntimeError:
                closed.append(rank)
        return closed


def padded(x: Tensor, rows: int) -> Tensor:
    """``x`` with zeros below, as exchanges of one shape need."""
    missing = rows - x.shape[0]
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def _describe(facts: dict[str, Any]) -> str:
    def value(x):
        return "a tensor" if isinstance(x, Tensor) else str(x).removeprefix("torch.")

    return "\n".join(f"{name} {value(x)}" for name, x in facts.items())


def _disagreement(texts: list[str]) -> str:
    """Which facts differ, and on which ranks."""
    by_rank = [text.split("\n") for text in texts]
    parts = []
    for rank, facts in enumerate(by_rank):
        differing = [f for f in facts if any(f not in other for other in by_rank)]
        parts.append(f"rank {rank}: {', '.join(differing) or 'none of these'}")
    return f"the ranks disagree: {'; '.join(parts)}; expected the same on each"


def _in_time(ask: Callable):
    """``ask()``, a call to a store that may not answer.

    Raises:
        RuntimeError: the store is gone.
        TimeoutError: it does not answer.
    """
    answer: list = []

    def run():
        try:
            answer.append(ask())
        except RuntimeError as error:
            answer.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_STORE_PATIENCE)
    if not answer:
        raise TimeoutError
    if isinstance(answer[0], RuntimeError):
        raise answer[0]
    return answer[0]


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
