"""What the layers that compare are to compute, exactly: MaxSim of the tokens that the layers that read made, and the cosine of their averages.

MaxSim is the mean over the query's tokens of the best cosine in the document (ColBERT, Khattab and Zaharia 2020, arXiv:2004.12832). Both together
rank better than either alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from training.student import Read

AVERAGES = 0.5  # of the cosine of the averages, beside MaxSim, unless a step says otherwise

Tensor = torch.Tensor


def units(states: Tensor, ignored: Sequence[int]) -> Tensor:
    """(..., width), float32: unit vectors, 0 at the ignored coordinates."""
    known = torch.ones(states.shape[-1])
    known[list(ignored)] = 0.0
    return normalize(states.float() * known, dim=-1)


def scores(query: Tensor, documents: Sequence[Tensor]) -> Tensor:
    """(n,): exact late interaction of a query's unit tokens (T, width) with those of n documents."""
    padded = pad_sequence(list(documents), batch_first=True)
    missing = torch.arange(padded.shape[1]) >= torch.tensor([len(one) for one in documents])[:, None]
    cosines = torch.einsum("td,nkd->ntk", query, padded).masked_fill(missing[:, None], -1.0)
    averages = normalize(torch.stack([one.mean(0) for one in documents]), dim=-1) @ normalize(query.mean(0), dim=0)
    return cosines.amax(2).mean(1) + AVERAGES * averages


@torch.no_grad()
def found(part: Read, ignored: Sequence[int], averages: float = AVERAGES) -> Tensor:
    """(n, T): for every token of the query (T: of the longest) its best cosine in the document, and `averages` times its part of the cosine of the
    averages; 0 behind its end."""
    vectors = units(part.states.masked_fill(~(part.queries | part.documents)[..., None], 0.0), ignored)
    asking = part.queries[:, : int(part.queries.sum(1).max())]
    tokens = vectors[:, : asking.shape[1]]
    cosines = torch.bmm(tokens, vectors.transpose(1, 2)).masked_fill(~part.documents[:, None], -1.0)
    queries, documents = ((vectors * chosen[..., None]).sum(1) / chosen.sum(1, keepdim=True) for chosen in (part.queries, part.documents))
    share = torch.bmm(tokens, normalize(documents, dim=-1)[..., None])[..., 0] / queries.norm(dim=-1, keepdim=True)
    return (cosines.amax(-1) + averages * share).masked_fill(~asking, 0.0)
