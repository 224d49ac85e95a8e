"""Bad input to a queue or bank gets one sentence naming the argument, what came, what was expected."""

import pytest
import torch

from fastcl import CMCLoss, InfoNCELoss, MemoryBank, NegativeQueue, NTXentLoss
from fastcl import functional as f

Z = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: q.enqueue(torch.randn(4, 2)), ValueError, r"keys has shape \(4, 2\).*expected width 3, that of the queue"),
        (lambda q: q.enqueue(Z.int()), TypeError, "keys .* dtype int32"),
        (lambda q: q.enqueue(Z.to("meta")), ValueError, "keys .* on meta; expected cpu, where the queue is"),
        (lambda q: q.enqueue(Z * float("nan")), ValueError, "keys holds NaN or infinity in 4 of its 4 rows"),
        (lambda q: q.enqueue(Z, torch.rand(4)), TypeError, "ids .* expected a tensor of 4 integers"),
        (lambda q: q.enqueue(Z, torch.arange(3)), ValueError, "ids .* expected 4 integers"),
        (lambda q: NegativeQueue(3, 4, dtype=torch.float16, normalize=False).enqueue(1e6 * Z), ValueError, "as stored in float16"),
        (lambda q: f.info_nce(Z[:, :2], Z[:, :2], queue=q), ValueError, "queries .* expected width 3, that of the queue"),
        (lambda q: f.info_nce(Z, Z, queue=q, normalize=False), ValueError, "queue has normalize=True; expected False, like the loss"),
        (lambda q: NTXentLoss(queue=q, normalize=False), ValueError, "queue has normalize=True"),
        (lambda q: InfoNCELoss(queue=Z), TypeError, "queue has shape .* expected a fastcl.NegativeQueue"),
        (lambda q: f.sup_con(torch.stack([Z, Z], 1), queue=q), ValueError, "queue came without labels"),
        (lambda q: NegativeQueue(0, 4), ValueError, "dim is 0"),
        (lambda q: NegativeQueue(3, 4.5), ValueError, "size is 4.5"),
        (lambda q: NegativeQueue(3, 4, dtype=torch.int8), TypeError, "dtype is torch.int8; expected float32"),
        (lambda q: NegativeQueue(3, 4, distributed="ring"), ValueError, "distributed is 'ring'"),
        (lambda q: f.memory_bank(Z, torch.arange(4), q), TypeError, "bank is a NegativeQueue; expected a fastcl.MemoryBank"),
        (lambda q: f.memory_bank(Z, torch.arange(4), MemoryBank(9, 2)), ValueError, "features .* expected width 2 on cpu, like the bank"),
        (lambda q: f.memory_bank(Z, torch.arange(4), MemoryBank(3, 3)), ValueError, r"indices holds 1 outside \[0, 3\)"),
        (lambda q: f.memory_bank(Z, torch.rand(4), MemoryBank(9, 3)), TypeError, "indices .* expected a tensor of 4 integers"),
        (lambda q: f.memory_bank(Z, torch.arange(4), MemoryBank(9, 3), form="full"), ValueError, "form is 'full'"),
        (lambda q: f.memory_bank(Z, torch.arange(4), MemoryBank(9, 3), form="nce", negatives=0), ValueError, "negatives is 0"),
        (lambda q: f.memory_bank(Z, torch.arange(4), MemoryBank(9, 3), form="nce", negatives=torch.arange(4)), ValueError, r"negatives .* expected sample numbers \[4, K\]"),
        (lambda q: MemoryBank(9, 3).update(torch.arange(3), Z), ValueError, "indices .* expected 4 integers"),
        (lambda q: MemoryBank(9, 3, momentum=2.0), ValueError, "momentum is 2.0"),
        (lambda q: CMCLoss(9, 3)(Z, indices=torch.arange(4)), ValueError, "features came 1; expected 2 views"),
        (lambda q: CMCLoss(9, 3, views=1), ValueError, "views is 1; expected at least 2"),
        (lambda q: CMCLoss(9, 3, return_metrics=True), ValueError, "return_metrics is True; expected False, since CMCLoss has none"),
    ],
)  # fmt: skip
def test_error(call, error, message):
    with pytest.raises(error, match=message):
        call(NegativeQueue(3, 8))
