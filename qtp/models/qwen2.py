"""Qwen2 (arXiv 2407.10671), for Qwen1.5, Qwen2, Qwen2.5, Coder and QwQ.

T tokens in the step, D hidden, R rows to sample, V this rank's part of the vocabulary.
Every rank holds its own query heads with the KV heads they read, its own MLP columns and its own vocabulary rows; x_TD is
the same on all ranks. A block reduces twice, where the two partial sums join the residual stream.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from collectives.communicator import Communicator
from qtp.attention.backend import AttentionBackend
from qtp.batch import Batch
from qtp.config import ModelConfig
from qtp.kv.cache import KVCache
from qtp.layers.attention import Attention, Step
from qtp.layers.embedding import VocabEmbedding
from qtp.layers.linear import Linear
from qtp.layers.mlp import GatedMLP
from qtp.layers.norm import RMSNorm
from qtp.layers.rope import Rope
from qtp.layout.split import Grid, even
from qtp.weights.loader import Shard


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a rank's model stands: its rank in the grid, how it talks, its KV cache and how it attends over it."""

    rank: int
    grid: Grid
    comm: Communicator
    cache: KVCache
    attention: AttentionBackend


class Block:
    """One decoder layer. `feed_forward` is a GatedMLP or a MoE: either gives one partial sum."""

    def __init__(
        self,
        input_norm: RMSNorm,
        attention: Attention,
        post_norm: RMSNorm,
        feed_forward: Callable[[Tensor], Tensor],
        comm: Communicator,
    ) -> None:
        self.input_norm, self.attention = input_norm, attention
        self.post_norm, self.feed_forward = post_norm, feed_forward
        self.reduce = comm.all_reduce

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        x_TD = x_TD + self.reduce(self.attention(self.input_norm(x_TD), step))
        return x_TD + self.reduce(self.feed_forward(self.post_norm(x_TD)))


class Qwen2ForCausalLM:
    """The forward of one rank. `hidden` and `logits` communicate: every rank calls both with the same batch."""

    def __init__(self, config: ModelConfig, shard: Shard, place: Place, blocks: Sequence[Block] | None = None) -> None:
        self.vocab = even(config.vocab_size, place.grid.size, place.rank)
        self.embed = VocabEmbedding(shard["embed.weight"], self.vocab.start, place.comm)
        self.blocks = blocks or [block(config, shard, place, i, mlp(shard, f"layers.{i}.mlp")) for i in range(config.num_layers)]
        self.norm = RMSNorm(shard["norm.weight"], config.rms_norm_eps)
        self.lm_head = Linear(shard["embed.weight" if config.tie_word_embeddings else "lm_head.weight"])
        self.rope = Rope(config.rope, config.head_dim, shard["norm.weight"].device)
        self.backend = place.attention

    def hidden(self, batch: Batch) -> Tensor:
        """[T, D] after the final norm."""
        x_TD = self.embed(batch.token_ids_T)
        step = Step(batch, *self.rope.table(batch.positions_T, x_TD.dtype), self.backend.plan(batch))
        for block in self.blocks:
            x_TD = block(x_TD, step)
        return self.norm(x_TD)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, V] float32: the columns `vocab` of the logits. No communication."""
        return self.lm_head(hidden_RD).to(torch.float32)


def block(config: ModelConfig, shard: Shard, place: Place, layer: int, feed_forward: Callable[[Tensor], Tensor]) -> Block:
    own = f"layers.{layer}"
    attention = Attention(
        Linear(shard[f"{own}.attention.qkv.weight"], shard.get(f"{own}.attention.qkv.bias")),
        Linear(shard[f"{own}.attention.o.weight"]),
        place.attention,
        place.cache,
        layer=layer,
        heads=len(config.heads.query(place.rank, place.grid)),
        kv_heads=len(config.heads.kv(place.rank, place.grid)),
        window=config.sliding_window[layer],
    )
    input_norm = RMSNorm(shard[f"{own}.input_norm.weight"], config.rms_norm_eps)
    post_norm = RMSNorm(shard[f"{own}.post_norm.weight"], config.rms_norm_eps)
    return Block(input_norm, attention, post_norm, feed_forward, place.comm)


def mlp(shard: Shard, own: str) -> GatedMLP:
    return GatedMLP(Linear(shard[f"{own}.gate_up.weight"]), Linear(shard[f"{own}.down.weight"]))
