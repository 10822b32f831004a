"""Pairs of different lengths laid end to end, so that no forward pass computes padding.

Everything but attention works on the tokens of all pairs as one long row. For attention alone they are spread into a table of
(pairs, longest pair), whose empty places are masked, and gathered again: of nearly equal lengths that costs little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from reranker_worker.backends.texts import PairIds

# Added to the attention of an empty place: exp of it is 0 in every precision, and unlike -inf it never makes a NaN.
MASKED = -30000.0


class Packed(NamedTuple):
    """One pass over n pairs with T tokens in all and a table of L columns, which hold the longest."""

    ids: NDArray[np.int64]  # (T,) token ids
    types: NDArray[np.int64]  # (T,) token types
    positions: NDArray[np.int64]  # (T,) each token's place in its pair
    spread: NDArray[np.int64]  # (n, L) which token stands at this place of the table; 0 at an empty one
    gather: NDArray[np.int64]  # (T,) where in the flattened table each token stands
    first: NDArray[np.int64]  # (n,) the first token of each pair
    mask: NDArray[np.float32]  # (n, 1, 1, L) added to the attention scores
    lengths: NDArray[np.int64]  # (n,) tokens of each pair


def pack(pairs: Sequence[PairIds], rows: int = 1, columns: int = 1) -> Packed:
    """Lay one or more pairs end to end, in their order. T is rounded up to a multiple of `rows` by tokens of which nothing comes: runtimes
    that compile a kernel for every shape then meet few shapes. L is rounded up to a multiple of `columns`, unless there is one pair alone,
    which needs no empty places."""
    lengths = np.fromiter((len(pair.ids) for pair in pairs), dtype=np.int64, count=len(pairs))
    total, longest = int(lengths.sum()), int(lengths.max())
    if len(pairs) > 1:
        longest += -longest % columns
    starts = np.cumsum(lengths) - lengths
    places = np.arange(longest)
    filled = places[None, :] < lengths[:, None]
    extra = np.zeros(-total % rows, dtype=np.int64)
    ids = np.fromiter((number for pair in pairs for number in pair.ids), dtype=np.int64, count=total)
    types = np.fromiter((number for pair in pairs for number in pair.type_ids), dtype=np.int64, count=total)
    return Packed(
        ids=np.concatenate((ids, extra)),
        types=np.concatenate((types, extra)),
        positions=np.concatenate((np.arange(total) - np.repeat(starts, lengths), extra)),
        spread=np.where(filled, starts[:, None] + places, 0),
        gather=np.concatenate((np.flatnonzero(filled), extra)),
        first=starts,
        mask=np.where(filled, np.float32(0), np.float32(MASKED))[:, None, None, :],
        lengths=lengths,
    )
