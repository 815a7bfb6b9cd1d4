"""Token embedding and logits, cut by vocabulary. T tokens, D hidden, R rows to sample, V this rank's part of the vocabulary."""

import torch
from torch import Tensor
from torch.nn import functional as F

from collectives.communicator import Communicator


class VocabEmbedding:
    """Rows `start` .. `start` + V - 1 of the embedding. Each token is looked up by the one rank that holds its row; the sum over
    ranks is the embedding. One all_reduce, which every rank must join."""

    def __init__(self, weight_VD: Tensor, start: int, comm: Communicator) -> None:
        self.weight, self.start, self.comm = weight_VD, start, comm

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        if self.comm.size == 1:
            return F.embedding(token_ids_T, self.weight)
        local = token_ids_T - self.start
        mine = (local >= 0) & (local < self.weight.shape[0])
        if not self.weight.shape[0]:
            x_TD = self.weight.new_zeros(len(token_ids_T), self.weight.shape[1])
        else:
            x_TD = F.embedding(torch.where(mine, local, 0), self.weight) * mine[:, None]
        return self.comm.all_reduce(x_TD)
