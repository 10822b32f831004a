"""What the layers that compare are to compute, exactly: MaxSim of the tokens that the layers that read made, and the cosine of their averages.

MaxSim is the mean over the query's tokens of the best cosine in the document (ColBERT, Khattab and Zaharia 2020, arXiv:2004.12832). Both together
rank better than either alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from training.student import Read

AVERAGES = 0.5  # of the cosine of the averages, beside MaxSim

Tensor = torch.Tensor


def unit_tokens(part: Read, ignored: Sequence[int]) -> Tensor:
    """(n, L, width): unit vectors, 0 at the ignored coordinates and behind the end of a pair."""
    states = part.states.detach().float().masked_fill(~(part.queries | part.documents)[..., None], 0.0)
    states[..., list(ignored)] = 0.0
    return normalize(states, dim=-1)


@torch.no_grad()
def found(part: Read, ignored: Sequence[int]) -> Tensor:
    """(n, T): for every token of the query (T: of the longest) its best cosine in the document, and AVERAGES times its part of the averages' cosine;
    0 behind its end."""
    units = unit_tokens(part, ignored)
    asking = part.queries[:, : int(part.queries.sum(1).max())]
    tokens = units[:, : asking.shape[1]]
    cosines = torch.bmm(tokens, units.transpose(1, 2)).masked_fill(~part.documents[:, None], -1.0)
    queries, documents = ((units * chosen[..., None]).sum(1) / chosen.sum(1, keepdim=True) for chosen in (part.queries, part.documents))
    share = torch.bmm(tokens, normalize(documents, dim=-1)[..., None])[..., 0] / queries.norm(dim=-1, keepdim=True)
    return (cosines.amax(-1) + AVERAGES * share).masked_fill(~asking, 0.0)
