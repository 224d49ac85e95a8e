"""Loss and averaged gradients on 1, 2, 3 and 4 ranks are those of one process.

One start of processes serves every case: every loss, both modes, learnable scales, batches of
which one rank holds a single row.
"""

import pytest
import torch

import fastcl
from fastcl.distributed.check import Case, check_cases
from fastcl.testing import check_distributed

MODES = ("gather", "ring")
TWO_VIEWS = {
    "nt_xent": fastcl.NTXentLoss,
    "info_nce": fastcl.InfoNCELoss,
    "clip": fastcl.CLIPLoss,
    "margin_softmax": fastcl.MarginSoftmaxLoss,
    "dcl": fastcl.DCLLoss,
    "dclw": fastcl.DCLWLoss,
    "debiased": fastcl.DebiasedLoss,
    "hard_negative": fastcl.HardNegativeLoss,
    "siglip": fastcl.SigLIPLoss,
}
SMOOTHED = ("nt_xent", "info_nce", "clip", "margin_softmax")

RANDOM = torch.Generator().manual_seed(3)
IDS = torch.randint(0, 6, (13,), generator=RANDOM)  # most occur on several ranks
LABELS = torch.randint(0, 5, (13,), generator=RANDOM)
LABELS[:2] = torch.tensor([50, 51])  # anchors without a positive
WEIGHT = torch.rand(13, generator=RANDOM, dtype=torch.float64)
FEATURES = torch.randn(13, 6, generator=RANDOM, dtype=torch.float64)
FIXED = torch.randn(13, 8, generator=RANDOM, dtype=torch.float64)
VIEWS = torch.randn(13, 3, 6, generator=RANDOM, dtype=torch.float64)
FIRST_SMALL = {2: [1, 12], 3: [1, 11, 1], 4: [1, 1, 10, 1]}


def cases():
    found = {}
    for mode in MODES:
        learnable = {"learnable": True, "distributed": mode}
        for name, module in TWO_VIEWS.items():
            found[f"{name} {mode}"] = Case(module(**learnable))
            found[f"{name} {mode} ids weight metrics"] = Case(
                module(temperature=0.5, return_metrics=True, **learnable),
                options={"ids": IDS, "weight": WEIGHT},
                batches=FIRST_SMALL,
            )
            if name in SMOOTHED:
                found[f"{name} {mode} smoothed sum"] = Case(
                    module(label_smoothing=0.1, reduction="sum", **learnable), batches=FIRST_SMALL
                )
                found[f"{name} {mode} smoothed ids"] = Case(
                    module(label_smoothing=0.1, **learnable), options={"ids": IDS}
                )
            for dtype in (torch.float32, torch.bfloat16):
                found[f"{name} {mode} {dtype}"] = Case(
                    module(temperature=0.2, **learnable), dtype=dtype
                )
        for form in ("out", "in"):
            sup_con = fastcl.SupConLoss(form=form, return_metrics=True, **learnable)
            found[f"sup_con {mode} {form}"] = Case(sup_con, (FEATURES, LABELS))
            found[f"sup_con {mode} {form} views"] = Case(
                sup_con, (VIEWS,), {"weight": WEIGHT}, batches=FIRST_SMALL
            )
        # one class: nothing is left to tell a sample from
        found[f"nt_xent {mode} no negatives"] = Case(
            fastcl.NTXentLoss(return_metrics=True, **learnable), options={"ids": 0 * IDS}
        )
        one_way = fastcl.MarginSoftmaxLoss(bidirectional=False, **learnable)
        found[f"margin_softmax {mode} one way"] = Case(one_way)
        shared = (FEATURES, VIEWS[:, 0], VIEWS[:, 1])
        ids = {"ids": IDS, "negative_ids": IDS.flip(0)}
        found[f"info_nce {mode} shared negatives"] = Case(
            fastcl.InfoNCELoss(label_smoothing=0.1, return_metrics=True, **learnable), shared, ids
        )
        found[f"info_nce {mode} own negatives"] = Case(
            fastcl.InfoNCELoss(**learnable), (FEATURES, VIEWS[:, 0], VIEWS)
        )
        fixed = {"negative_keys": FIXED, "ids": LABELS, "negative_ids": LABELS.flip(0)}
        found[f"info_nce {mode} keys without gradient"] = Case(
            fastcl.InfoNCELoss(return_metrics=True, **learnable),
            options=fixed,
            batches=FIRST_SMALL,
        )
        found[f"sim_cse {mode} hard"] = Case(
            fastcl.SimCSELoss(hard_negative_weight=0.5, return_metrics=True, **learnable),
            shared,
            batches=FIRST_SMALL,
        )
        found[f"cmc {mode}"] = Case(fastcl.InBatchCMCLoss(**learnable), shared)
        found |= memory_cases(mode, learnable)
    return found


def memory_cases(mode, learnable):
    """A queue or a bank holds the same on every rank; the mean is the global one."""
    width = 8  # of the embeddings
    queue = fastcl.NegativeQueue(width, 40, dtype=torch.float64)
    queue.enqueue(torch.randn(30, width, generator=RANDOM), torch.arange(30) % 7)
    rich = {"label_smoothing": 0.1, "return_metrics": True, "queue": queue, **learnable}
    ids = {"ids": IDS}
    sup_con = fastcl.SupConLoss(queue=queue, **learnable)
    bank = fastcl.MemoryBankLoss(20, width, dtype=torch.float64, **learnable)
    sampled = fastcl.MemoryBankLoss(20, width, dtype=torch.float64, form="nce", **learnable)
    drawn = {"negatives": torch.randint(0, 20, (13, 5), generator=RANDOM)}
    return {
        f"info_nce {mode} queue": Case(fastcl.InfoNCELoss(**rich), options=ids),
        f"nt_xent {mode} queue": Case(fastcl.NTXentLoss(**rich), options=ids, batches=FIRST_SMALL),
        f"sup_con {mode} queue": Case(sup_con, (FEATURES, LABELS % 9)),
        f"memory_bank {mode}": Case(bank, (FEATURES, torch.arange(13))),
        f"memory_bank {mode} nce": Case(sampled, (FEATURES, torch.arange(13)), drawn),
    }


def test_every_loss():
    outcomes = check_cases(cases(), timeout=100)
    assert len(outcomes) == 4 * len(cases())


def test_a_loss_that_stays_on_its_rank_is_found_out():
    with pytest.raises(AssertionError, match=r"NTXentLoss, rows \[12, 1\]: loss .* WRONG"):
        check_distributed(fastcl.NTXentLoss(0.5), (2,))


def test_reduction_none_is_refused():
    """A mean taken later on each rank would weigh unequal batches wrongly."""
    z = torch.randn(2, 4, 3)
    with pytest.raises(ValueError, match="reduction is 'none' with distributed='ring'; expected"):
        fastcl.NTXentLoss(reduction="none", distributed="ring")(*z)


def test_messages_without_a_group():
    z = torch.randn(2, 4, 3)
    with pytest.raises(RuntimeError, match="distributed is 'gather', but there is no process"):
        fastcl.functional.clip(*z, distributed="gather")
    with pytest.raises(ValueError, match="distributed is 'all'; expected None or one of"):
        fastcl.CLIPLoss(distributed="all")
