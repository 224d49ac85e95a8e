"""How pairs are classified, once log-sum-exps over their negatives are known."""

import triton
import triton.language as tl

from .tile import LOG2E, log1p


@triton.jit
def _classify(logsum, score):
    """Loss of a row, softplus(logsum - score), and its derivative; 0 without a negative (-inf)."""
    gap = logsum - score
    small = tl.math.exp2(-tl.abs(gap) * LOG2E)
    loss = tl.maximum(gap, 0.0) + log1p(small)
    return loss, tl.where(gap >= 0, 1.0, small) / (1.0 + small)


# halves of a vector begin where they may
@triton.jit(
    do_not_specialize=["size"],
    do_not_specialize_on_alignment=["rows", "columns", "grad_rows", "grad_columns"],
)
def classify(
    cosines, rows, columns, scale, grad_rows, grad_columns, grad_cosines, sums, size, share,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses of pairs with cosines [N] among log-sum-exps of ``rows`` [N] and, if COLUMNS, again
    among those of ``columns``, each ``share`` of the whole; derivatives by all three [N].

    Slots of ``sums`` [2, programs]: the losses, and the derivative by the scale of the pairs' own
    scores.
    """
    program = tl.program_id(0)
    index = program * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    cosine = tl.load(cosines + index, mask=inside, other=0.0)
    factor = tl.load(scale)
    none = -float("inf")
    loss, gain = _classify(tl.load(rows + index, mask=inside, other=none), cosine * factor)
    tl.store(grad_rows + index, gain * share, mask=inside)
    if COLUMNS:
        other_loss, other = _classify(
            tl.load(columns + index, mask=inside, other=none), cosine * factor
        )
        tl.store(grad_columns + index, other * share, mask=inside)
        loss += other_loss
        gain += other
    gain = -gain * share
    tl.store(grad_cosines + index, gain * factor, mask=inside)
    tl.store(sums + program, tl.sum(loss, 0) * share)
    tl.store(sums + tl.num_programs(0) + program, tl.sum(gain * cosine, 0))
