"""Qwen2 (arXiv 2407.10671), for Qwen1.5, Qwen2, Qwen2.5, Coder and QwQ.

T tokens in the step, D hidden, R rows to sample, V this rank's part of the vocabulary.
Every rank holds its own query heads with the KV heads they read, its own MLP columns and its own vocabulary rows; x_TD is
the same on all ranks. A block reduces twice, where the two partial sums join the residual stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from collectives.communicator import Communicator
from qtp.attention.backend import AttentionBackend
from qtp.batch import Batch
from qtp.config import ModelConfig
from qtp.kernels.interface import Cuts, Deferred, Kernels, Norm, Partial, Reduce, RowOp
from qtp.layers.attention import Attention
from qtp.layers.embedding import VocabEmbedding
from qtp.layers.mlp import GatedMLP
from qtp.layers.rope import Rope
from qtp.layout.split import Grid, even
from qtp.weights.assemble import Shard


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a rank's model stands: its rank in the grid, how it talks and adds up partial sums, what it computes with, how it
    attends. cuts: of row linears by name of their weight, where sums must not depend on the world size."""

    rank: int
    grid: Grid
    comm: Communicator
    reduce: Reduce
    kernels: Kernels
    attention: AttentionBackend
    cuts: Mapping[str, Cuts]


class Block:
    """One decoder layer. `attention` and `feed_forward` (a GatedMLP or a MoE) each begin with their RMSNorm, which is fused with
    what follows, and give one partial sum."""

    def __init__(self, attention: Attention, feed_forward: RowOp, reduce: Reduce) -> None:
        self.attention, self.feed_forward, self.reduce = attention, feed_forward, reduce

    def __call__(self, x_TD: Tensor, plan: object) -> Tensor:
        x_TD = self._join(x_TD, self.attention(x_TD, plan))
        return self._join(x_TD, self.feed_forward(x_TD))

    def _join(self, x_TD: Tensor, partial: Partial) -> Tensor:
        """x + reduce(partial)."""
        return partial.add_to(x_TD) if isinstance(partial, Deferred) else x_TD.add_(self.reduce(partial))


class Qwen2ForCausalLM:
    """The forward of one rank. `hidden` communicates: every rank calls it with the same batch."""

    def __init__(self, config: ModelConfig, shard: Shard, place: Place, blocks: Sequence[Block] | None = None) -> None:
        self.vocab = even(config.vocab_size, place.grid.size, place.rank)
        self.embed = VocabEmbedding(shard["embed.weight"], self.vocab.start, place.comm)
        self.blocks = blocks or [
            block(config, shard, place, i, mlp(shard, place, f"layers.{i}.mlp", norm(config, shard, f"layers.{i}.post_norm")))
            for i in range(config.num_layers)
        ]
        self.norm = place.kernels.rms_norm(norm(config, shard, "norm"))
        self.head = place.kernels.head(shard["embed.weight" if config.tie_word_embeddings else "lm_head.weight"])
        self.rope = Rope(config.rope, config.head_dim, shard["norm.weight"].device)
        self.backend = place.attention

    def hidden(self, batch: Batch) -> Tensor:
        """[T, D] after the final norm."""
        x_TD = self.embed(batch.token_ids_T)
        plan = self.backend.plan(batch, *self.rope.table(batch.positions_T, max(batch.kv_lens)))
        for block in self.blocks:
            x_TD = block(x_TD, plan)
        return self.norm(x_TD)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, V] float32: the columns `vocab` of the logits. No communication."""
        return self.head.logits(hidden_RD)

    def best(self, hidden_RD: Tensor, count: int, allowed: int) -> tuple[Tensor, Tensor]:
        """The best `count` of the first `allowed` columns of the logits, as `Head.best`. No communication."""
        return self.head.best(hidden_RD, count, allowed)


def block(config: ModelConfig, shard: Shard, place: Place, layer: int, feed_forward: RowOp) -> Block:
    own = f"layers.{layer}"
    qkv, bias = shard[f"{own}.attention.qkv.weight"], shard.get(f"{own}.attention.qkv.bias")
    attention = Attention(
        place.kernels.linear(qkv, bias, norm=norm(config, shard, f"{own}.input_norm")),
        row_linear(shard, place, f"{own}.attention.o.weight"),
        place.attention,
        place.comm,
        layer=layer,
        head_dim=config.head_dim,
        window=config.sliding_window[layer],
    )
    return Block(attention, feed_forward, place.reduce)


def norm(config: ModelConfig, shard: Shard, name: str) -> Norm:
    weight, anti = shard.get(f"{name}.anti.weight"), None
    if weight is not None:
        anti = Norm(weight, config.rms_norm_eps, bias=shard[f"{name}.anti.bias"])
    return Norm(shard[f"{name}.weight"], config.rms_norm_eps, anti=anti)


def mlp(shard: Shard, place: Place, own: str, norm: Norm) -> GatedMLP:
    gated = place.kernels.gated(shard[f"{own}.gate_up.weight"], norm=norm)
    return GatedMLP(gated, row_linear(shard, place, f"{own}.down.weight"), place.comm)


def row_linear(shard: Shard, place: Place, name: str) -> RowOp:
    """Where there is one rank and no cuts, sums in integers are scaled at once: to the same bits as after a reduce."""
    cuts = place.cuts.get(name)
    if cuts is None and place.comm.size == 1:
        return place.kernels.joining(shard[name])
    return place.kernels.linear(shard[name], cuts=cuts, across=place.comm)
