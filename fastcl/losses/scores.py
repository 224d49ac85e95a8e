"""Score functions: how alike a query and a key are, as a dot product of two maps."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..ops import l2_normalize
from ..ops.checks import check_same_shape


class Score(nn.Module):
    """s(x, y) = <g(x), h(y)>: every score of that form streams through every loss.

    - ``Score()``: the dot product; ``Score(normalize=True)``: the cosine.
    - ``Score(nn.Linear(dx, dy, bias=False))``: bilinear, (W x)^T y.
    - ``Score(g, h)``: asymmetric, a network for each side.

    ``score(x, y)`` gives aligned rows their scores, for losses of scores (:func:`triplet_score`,
    :func:`nce`). A loss over all pairs takes the mapped rows:
    ``info_nce(*score.sides(x, y), temperature=1.0, normalize=False)``.

    Args:
        query_map, key_map: modules or functions [N, .] to [N, D]; ``None`` leaves a side alone.
        normalize: divide mapped rows by their length.
    """

    def __init__(
        self,
        query_map: Callable[[Tensor], Tensor] | None = None,
        key_map: Callable[[Tensor], Tensor] | None = None,
        *,
        normalize: bool = False,
    ):
        super().__init__()
        self.query_map = query_map
        self.key_map = key_map
        self.normalize = normalize

    def sides(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """The rows [N, D] and [M, D] whose dot products are the scores."""
        maps = ((self.query_map, query), (self.key_map, key))
        rows = [x if function is None else function(x) for function, x in maps]
        if self.normalize:
            rows = [l2_normalize(x)[0] for x in rows]
        return rows[0], rows[1]

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores [N] of aligned rows.

        Raises:
            TypeError, ValueError: mapped rows that are not float matrices of one shape.
        """
        a, b = self.sides(query, key)
        check_same_shape(a, b, "query", "key")
        return (a * b).sum(1)
