"""Where a decoder looks: attention of recurrent networks.

additive   e_ij = v^T tanh(W_s s_i + W_h h_j + b)    "Neural Machine Translation by Jointly
                                                     Learning to Align and Translate"
                                                     (Bahdanau et al. 2014)
general    e_ij = s_i^T W h_j                        "Effective Approaches to Attention-based
dot        e_ij = s_i^T h_j                          Neural Machine Translation" (Luong et al.
                                                     2015)
alpha_i = softmax over the valid j of e_ij;  c_i = sum_j alpha_ij h_j
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

Kind = Literal["additive", "general", "dot"]
KINDS = ("additive", "general", "dot")


class Alignment(nn.Module):
    """One of the three scores, and the softmax over what they are of.

    Args:
        kind: which score.
        query_dim: width of the states s that look; `dot` asks it to be memory_dim.
        memory_dim: width of the states h that are looked at.
        hidden_dim: width of the additive score's hidden layer.
    """

    def __init__(self, kind: Kind, query_dim: int, memory_dim: int, hidden_dim: int) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"attention is {kind!r}; expected one of {', '.join(KINDS)}, or null")
        if kind == "dot" and query_dim != memory_dim:
            raise ValueError(
                f"attention dot multiplies states of {query_dim} and {memory_dim} values; make "
                f"them alike, or use general"
            )
        self.kind = kind
        self.memory: nn.Module = nn.Identity()
        if kind == "additive":
            self.memory = nn.Linear(memory_dim, hidden_dim)  # W_h and b
            self.query = nn.Linear(query_dim, hidden_dim, bias=False)
            self.score = nn.Linear(hidden_dim, 1, bias=False)
        elif kind == "general":
            self.memory = nn.Linear(memory_dim, query_dim, bias=False)

    def prepare(self, memory: Float[Tensor, "b s e"]) -> Float[Tensor, "b s a"]:
        """What of the score depends on the memory alone, made once for all queries."""
        out: Tensor = self.memory(memory)
        return out

    def forward(
        self,
        queries: Float[Tensor, "b t d"],
        prepared: Float[Tensor, "b s a"],
        is_valid: Bool[Tensor, "b s"],
    ) -> Float[Tensor, "b t s"]:
        """The weights alpha; they are zero where the memory is not valid."""
        if self.kind == "additive":
            hidden = torch.tanh(self.query(queries)[:, :, None] + prepared[:, None])
            scores = self.score(hidden)[..., 0]
        else:
            scores = queries @ prepared.mT
        seen: Tensor = scores.float().masked_fill(~is_valid[:, None], -torch.inf)
        return seen.softmax(dim=-1)
