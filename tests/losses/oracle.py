"""The losses written plainly and densely from their formulas alone.

In float64 they are the oracle; :func:`in_precision` makes them what a user writes today.
"""

import contextlib
import math

import torch
import torch.nn.functional as F

_precision = torch.float64


@contextlib.contextmanager
def in_precision(dtype):
    """Evaluate everything in ``dtype`` instead of float64."""
    global _precision
    _precision = dtype
    yield
    _precision = torch.float64


def up(x):
    return x.to(_precision)


def masked_lse(s, keep, dim=1):
    return torch.logsumexp(s.masked_fill(~keep, float("-inf")), dim)


def two_views(z1, z2, temperature, ids=None):
    """Scores [2B, 2B], the positive's column, and which pairs are negatives."""
    z = F.normalize(up(torch.cat([z1, z2])))
    n, b = len(z), len(z1)
    positive = torch.arange(n).roll(b)
    keep = ~torch.eye(n, dtype=torch.bool)
    keep[torch.arange(n), positive] = False
    if ids is not None:
        both = torch.cat([ids, ids])
        keep &= both[:, None] != both
    s = z @ z.T / temperature
    return s, s[torch.arange(n), positive], keep


def softplus(x):
    return -F.logsigmoid(-x)


def smoothed(losses, s, positive, keep, label_smoothing):
    mean = (s.masked_fill(~keep, 0.0).sum(1) + positive) / (keep.sum(1) + 1)
    return losses + label_smoothing * (positive - mean)


def nt_xent(z1, z2, temperature=0.1, ids=None, label_smoothing=0.0):
    s, positive, keep = two_views(z1, z2, temperature, ids)
    losses = softplus(masked_lse(s, keep) - positive)
    return smoothed(losses, s, positive, keep, label_smoothing)


def dcl(z1, z2, temperature=0.1, sigma=None, ids=None):
    s, positive, keep = two_views(z1, z2, temperature, ids)
    weight = 1.0
    if sigma is not None:
        cosine = positive.detach() * temperature
        half = 2 - len(z1) * torch.softmax(cosine[: len(z1)] / sigma, 0)
        weight = torch.cat([half, half])
    return masked_lse(s, keep) - weight * positive


def hard_negative(z1, z2, temperature=0.5, beta=1.0, tau_plus=0.1, ids=None):
    s, positive, keep = two_views(z1, z2, temperature, ids)
    e = s.exp().masked_fill(~keep, 0.0)
    n = up(keep.sum(1))
    importance = (beta * s).exp().masked_fill(~keep, 0.0)
    total = (importance * e).sum(1) / (importance.sum(1) / n)
    corrected = (total - tau_plus * n * positive.exp()) / (1 - tau_plus)
    floor = n * torch.exp(torch.tensor(-1.0 / temperature, dtype=_precision))
    return torch.log1p(torch.maximum(corrected, floor) / positive.exp())


def debiased(z1, z2, temperature=0.5, tau_plus=0.1, ids=None):
    return hard_negative(z1, z2, temperature, 0.0, tau_plus, ids)


def both(a, b, temperature, ids=None, margin=0.0):
    a, b = F.normalize(up(a)), F.normalize(up(b))
    s = a @ b.T / temperature
    keep = ~torch.eye(len(a), dtype=torch.bool)
    if ids is not None:
        keep &= ids[:, None] != ids
    return s, s.diagonal() - margin / temperature, keep


def clip(a, b, temperature=0.07, ids=None, label_smoothing=0.0, margin=0.0):
    s, positive, keep = both(a, b, temperature, ids, margin)
    losses = 0.5 * (
        softplus(masked_lse(s, keep) - positive) + softplus(masked_lse(s, keep, 0) - positive)
    )
    if not label_smoothing:
        return losses
    halves = (smoothed(0.0, x, positive, k, label_smoothing) for x, k in ((s, keep), (s.T, keep.T)))
    return losses + 0.5 * sum(halves)


def margin_softmax(a, b, temperature=0.05, margin=0.3, ids=None, bidirectional=True):
    if bidirectional:
        return clip(a, b, temperature, ids, margin=margin)
    s, positive, keep = both(a, b, temperature, ids, margin)
    return softplus(masked_lse(s, keep) - positive)


def info_nce(q, p, negatives=None, temperature=0.1, ids=None, negative_ids=None,
             label_smoothing=0.0):  # fmt: skip
    if negatives is None:  # normalised there, and twice would be another gradient for a zero row
        s, positive, keep = both(q, p, temperature, ids)
    else:
        q, p = F.normalize(up(q)), F.normalize(up(p))
        positive = (q * p).sum(1) / temperature
        k = F.normalize(up(negatives), dim=-1)
        s = (torch.einsum("nd,nmd->nm", q, k) if k.dim() == 3 else q @ k.T) / temperature
        keep = torch.ones_like(s, dtype=torch.bool)
        if ids is not None:
            keep = ids[:, None] != negative_ids
    losses = softplus(masked_lse(s, keep) - positive)
    return smoothed(losses, s, positive, keep, label_smoothing)


def sup_con(features, labels, temperature=0.1, form="out"):
    if features.dim() == 3:
        labels = labels.repeat(features.shape[1])
        features = features.transpose(0, 1).flatten(0, 1)
    z = F.normalize(up(features))
    s = z @ z.T / temperature
    other = ~torch.eye(len(z), dtype=torch.bool)
    same = (labels[:, None] == labels) & other
    count = up(same.sum(1))
    some = count > 0
    keep = torch.where(some[:, None], same, other)  # any valid mask where there is no positive
    if form == "in":
        losses = masked_lse(s, other) - masked_lse(s, keep) + count.clamp(min=1).log()
    else:
        mean = s.masked_fill(~same, 0.0).sum(1) / count.clamp(min=1)
        losses = masked_lse(s, other) - mean
    return torch.where(some, losses, 0.0)


def siglip(a, b, temperature=0.1, bias=-10.0, ids=None):
    a, b = F.normalize(up(a)), F.normalize(up(b))
    logits = a @ b.T / temperature + bias
    sign = 2.0 * torch.eye(len(a), dtype=_precision) - 1.0
    losses = softplus(-sign * logits)
    if ids is not None:
        drop = (ids[:, None] == ids) & (sign < 0)
        losses = losses.masked_fill(drop, 0.0)
    return losses.sum(1)


def distances(a, b, distance="squared"):
    squares = (a[:, None] - b).square().sum(2)
    return squares if distance == "squared" else safe_root(squares)


def safe_root(squares):
    return torch.where(squares > 0, torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)


def pairwise_contrastive(a, b, similar, margin=1.0, form="hadsell"):
    squares = (up(a) - up(b)).square().sum(1)
    apart = margin - (safe_root(squares) if form == "hadsell" else squares)
    apart = apart.clamp(min=0)
    return 0.5 * torch.where(similar, squares, apart.square() if form == "hadsell" else apart)


def triplet(a, p, n, margin=0.2, distance="squared", normalize=True):
    a, p, n = (F.normalize(up(x)) if normalize else up(x) for x in (a, p, n))
    near, far = ((a - x).square().sum(1) for x in (p, n))
    if distance == "euclidean":
        near, far = safe_root(near), safe_root(far)
    return (near - far + margin).clamp(min=0)


def mined_triplet(x, labels, margin=0.2, mining="batch_hard", distance="squared"):
    """Sums [N] over the triplets that count, and their number [N]."""
    x = F.normalize(up(x))
    d = distances(x, x, distance)
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(x), dtype=torch.bool)
    if mining == "batch_hard":
        far = d.masked_fill(~positive, -1.0).amax(1)
        near = d.masked_fill(same, 9.0).amin(1)
        counted = positive.any(1) & ~same.all(1)
        return (far - near + margin).clamp(min=0) * counted, counted
    near, far = d[:, :, None], d[:, None, :]
    losses = near - far + margin
    keep = positive[:, :, None] & ~same[:, None, :]
    if mining == "semi_hard":
        farther = (far > near) & keep
        nearest = far.masked_fill(~farther, 9.0).amin(2)
        choice = torch.where(farther.any(2), nearest, far.masked_fill(~keep, -1.0).amax(2))
        losses, keep = near[:, :, 0] - choice + margin, keep.any(2)
        return (losses.clamp(min=0) * keep).sum(1), keep.sum(1)
    keep = keep & (losses > 0)
    if mining == "semi_hard_all":
        keep = keep & (far > near)
    return losses.masked_fill(~keep, 0.0).sum((1, 2)), keep.sum((1, 2))


def lifted_structure(x, labels, margin=1.0, distance="euclidean"):
    d = distances(up(x), up(x), distance)
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(x), dtype=torch.bool)
    push = (margin - d).exp().masked_fill(same, 0.0).sum(1)
    both = (push[:, None] + push).log() + d
    return (0.5 * both.clamp(min=0).square() * positive).sum(1), positive.sum(1)


def multi_similarity(x, labels, alpha=2.0, beta=50.0, base=0.5, epsilon=0.1):
    x = F.normalize(up(x))
    s = x @ x.T
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(x), dtype=torch.bool)
    negative = ~same
    if epsilon is not None:
        least = s.masked_fill(~positive, 9.0).amin(1, keepdim=True)
        most = s.masked_fill(same, -9.0).amax(1, keepdim=True)
        positive, negative = positive & (s < most + epsilon), negative & (s > least - epsilon)
    pull = (-alpha * (s - base)).exp().masked_fill(~positive, 0.0).sum(1)
    push = (beta * (s - base)).exp().masked_fill(~negative, 0.0).sum(1)
    return pull.log1p() / alpha + push.log1p() / beta


def cpc(predictions, targets, temperature=1.0, negatives="batch"):
    """Loops over steps; scores [B T, B T] of each with the mask that ``negatives`` says."""
    p, z = up(predictions), up(targets)
    b, t, steps, _ = p.shape
    sequence, time = torch.arange(b).repeat_interleave(t), torch.arange(t).repeat(b)
    same_sequence, same_time = sequence[:, None] == sequence, time[:, None] == time
    keep = {
        "batch": same_time & ~same_sequence,
        "sequence": same_sequence & ~same_time,
        "all": ~(same_sequence & same_time),
        "other_sequences": ~same_sequence,
    }[negatives]
    total = 0.0
    for k in range(steps):
        s = p[:, :, k].flatten(0, 1) @ z[:, :, k].flatten(0, 1).T / temperature
        total = total + softplus(masked_lse(s, keep) - s.diagonal()).view(b, t).mean(1)
    return total / steps


def cpc_bce(predictions, targets, labels):
    logits = (up(predictions) * up(targets)).mean((1, 2))
    return softplus(torch.where(labels, -logits, logits))


def arora(a, p, n, form, kind):
    a, p, n = up(a), up(p), up(n)
    p = p if p.dim() == 2 else p.mean(1)
    if kind == "own":
        n = n[:, None]
    else:
        n = n.mean(-2)
        n = n.expand(len(a), *n.shape) if kind == "shared" else n
    v = (a[:, None] * (p[:, None] - n)).sum(2)
    if form == "logistic":
        return torch.log2(1 + (-v).exp().sum(1))
    return (1 + (-v).amax(1)).clamp(min=0)


def cswm(state, transition, following, order, form="paper", margin=1.0, sigma=0.5):
    z, t, after = up(state), up(transition), up(following)

    def energy(x, y):
        return (x - y).square().sum(2).mean(1) / (2 * sigma**2)

    repel = energy(z[order], after) if form == "paper" else energy(z, z[order])
    return energy(z + t, after) + (margin - repel).clamp(min=0)


def transe(head, relation, tail, negative_head, negative_tail, margin=1.0, distance="euclidean"):
    h, r, t, h2, t2 = (up(x) for x in (head, relation, tail, negative_head, negative_tail))

    def far(a, b):
        if distance == "l1":
            return (a - b).abs().sum(1)
        squares = (a - b).square().sum(1)
        return squares if distance == "squared" else squares.sqrt()

    return (margin + far(h + r, t) - far(h2 + r, t2)).clamp(min=0)


def nce(positive, negative, log_noise):
    shift = log_noise + math.log(negative.shape[1])
    return softplus(shift - up(positive)) + softplus(up(negative) - shift).sum(1)


def captions(positive, reference, negative, references, log_ratio=0.0):
    gain = up(positive) - up(reference) - log_ratio
    gains = up(negative) - up(references) - log_ratio
    return softplus(-gain) + softplus(gains).mean(1)


def cmc(views, temperature, form):
    total = 0.0
    for i, a in enumerate(views):
        for j, b in enumerate(views):
            if i == j:
                continue
            if form == "softmax":
                total = total + info_nce(a, b, temperature=temperature)
                continue
            s = F.normalize(up(a)) @ F.normalize(up(b)).T / temperature
            n = len(s)
            p = s.exp() / (n * s.detach().exp().mean())  # of each row of the batch
            noise = (n - 1) / n
            other = (noise / (p + noise)).log().masked_fill(torch.eye(n, dtype=torch.bool), 0.0)
            total = total - (p.diagonal() / (p.diagonal() + noise)).log() - other.sum(1)
    return total


def sim_cse(query, key, hard=None, temperature=0.05, hard_weight=0.0):
    q, k = F.normalize(up(query)), F.normalize(up(key))
    s = q @ k.T / temperature
    n = len(s)
    keep = ~torch.eye(n, dtype=torch.bool)
    positive = s.diagonal()
    if hard is not None:
        more = q @ F.normalize(up(hard)).T / temperature
        more = more + hard_weight * torch.eye(n, dtype=more.dtype)
        s, keep = torch.cat([s, more], 1), torch.cat([keep, torch.ones_like(keep)], 1)
    return softplus(masked_lse(s, keep) - positive)


def conditional(x, labels, proxies, temperature=0.5):
    x, p = F.normalize(up(x)), F.normalize(up(proxies))
    s = (x @ x.T / temperature).exp()
    s = s.masked_fill(torch.eye(len(x), dtype=torch.bool), 0.0)
    own = ((x * p[labels]).sum(1) / temperature).exp()
    same = labels[:, None] == labels
    return -((own + s.masked_fill(~same, 0.0).sum(1)) / (own + s.sum(1))).log()


def kl(mean, std, other_mean, other_std):
    """Of normal distributions, the sum over dimensions."""
    ratio = (std / other_std).square()
    gap = ((up(mean) - other_mean) / other_std).square()
    return 0.5 * (ratio + gap - 1 - ratio.log()).sum(1)


def domain_sup_con(target, source, labels, source_labels, temperature=0.1, form="out"):
    s = F.normalize(up(target)) @ F.normalize(up(source)).T / temperature
    same = labels[:, None] == source_labels
    count = same.sum(1)
    total = torch.logsumexp(s, 1)
    if form == "in":
        kept = torch.where(count[:, None] > 0, same, True)
        losses = total - masked_lse(s, kept) + count.clamp(min=1).to(s.dtype).log()
    else:
        losses = total - s.masked_fill(~same, 0.0).sum(1) / count.clamp(min=1)
    return torch.where(count > 0, losses, 0.0)


def zlpr(scores, targets):
    e = up(scores)
    absent = e.exp().masked_fill(targets, 0.0).sum(1)
    present = (-e).exp().masked_fill(~targets, 0.0).sum(1)
    return absent.log1p() + present.log1p()
