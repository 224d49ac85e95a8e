"""Bad input to a queue or bank gets one sentence naming the argument, what came, what was expected."""

import pytest
import torch

from fastcl import InfoNCELoss, NegativeQueue, NTXentLoss
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
    ],
)  # fmt: skip
def test_error(call, error, message):
    with pytest.raises(error, match=message):
        call(NegativeQueue(3, 8))
