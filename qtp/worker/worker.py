"""One rank: the only place where layout, weights, cache, attention, model and sampling are put together."""

from collections.abc import Callable
from collections.abc import Sequence as Rows
from pathlib import Path

import torch

from collectives.communicator import Communicator
from collectives.tree import TreeReduce
from qtp.attention.native_backend import NativeAttention
from qtp.attention.torch_backend import TorchAttention
from qtp.batch import make_batch
from qtp.config import EngineConfig, ModelConfig
from qtp.kernels.interface import Op, Partial, Reduce
from qtp.kernels.native_kernels import NativeKernels
from qtp.kernels.torch_kernels import TorchKernels
from qtp.kv.cache import KVCache
from qtp.kv.scales import kv_scales
from qtp.layout.leaves import row_cuts
from qtp.layout.split import even
from qtp.models import FAMILIES, Place
from qtp.weights.assemble import assemble
from qtp.weights.checkpoint import open_checkpoint
from qtp.weights.loader import load
from qtp.weights.names import declare
from qtp.weights.quantized import Unscaled
from qtp.weights.verify import verify
from qtp.wire.messages import Chunk, Ready, StepPlan, StepResult, TokenLogprobs
from qtp.worker.sampling import PROMPT_TILE, Sampler, as_sample
from qtp.worker.sequence import Sequence


class Worker:
    """Reads this rank's shard and runs steps. `config` is resolved (see `qtp.resolve`) and the same on every rank.

    Raises ValueError, before any weight is read, if the checkpoint does not fit `model_config`.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        comm: Communicator,
        progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        assert config.num_kv_blocks is not None
        grid, dtype, device = config.grid(), getattr(torch, config.dtype), comm.device
        specs = declare(model_config)
        with open_checkpoint(Path(config.model), model_config.weight_files, grid, comm.rank) as store:
            verify(store, specs, grid)
            tensors = load(store, specs, comm.rank, grid, dtype, device, progress)
        shard = assemble(model_config, tensors, comm.rank, grid)
        query, kv = model_config.heads.query(comm.rank, grid), model_config.heads.kv(comm.rank, grid)
        group = model_config.num_heads // model_config.num_kv_heads
        cache = KVCache(
            model_config.num_layers,
            config.num_kv_blocks,
            config.block_size,
            len(kv),
            model_config.head_dim,
            dtype,
            device,
            kv_scales(model_config, tensors),
        )
        kv_of = tuple(h // group - kv.start for h in query)
        native = config.kernels == "native"
        place = Place(
            rank=comm.rank,
            grid=grid,
            comm=comm,
            reduce=_reduce(comm, _tree_reduce(comm, dtype) if config.deterministic else comm.all_reduce),
            kernels=NativeKernels(deterministic=config.deterministic) if native else TorchKernels(),
            attention=NativeAttention(cache, kv_of, device) if native else TorchAttention(cache, kv_of, device),
            cuts=row_cuts(specs, comm.rank, grid) if config.deterministic else {},
        )
        self.comm, self.cache = comm, cache
        self.model = FAMILIES[model_config.family](model_config, shard, place)
        sizes = [len(even(model_config.vocab_size, grid.size, rank)) for rank in range(grid.size)]
        self.sampler = Sampler(comm, sizes, min(config.vocab_limit or model_config.vocab_size, model_config.vocab_size))
        self.sequences: dict[int, Sequence] = {}
        self.ready = Ready(
            rank=comm.rank, bytes_read=store.bytes_read, weight_bytes=sum(t.numel() * t.element_size() for t in tensors.values())
        )

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Runs one step. Every rank must execute the same plans in the same order; rank 0's result is the one that counts."""
        self._learn(plan)
        chunks = sorted(plan.chunks, key=lambda chunk: chunk.count != 1)
        if not chunks:
            return StepResult(step=plan.step)
        parts = []
        for chunk in chunks:
            s = self.sequences[chunk.seq_id]
            parts.append((tuple(s.token_ids[chunk.start : chunk.start + chunk.count]), chunk.start, tuple(s.blocks)))
        hidden_TD = self.model.hidden(make_batch(parts, self.cache.block_size, self.comm.device))
        return self._answer(plan.step, chunks, hidden_TD)

    def _learn(self, plan: StepPlan) -> None:
        for seq_id in plan.dropped:
            del self.sequences[seq_id]
        for new in plan.started:
            self.sequences[new.seq_id] = Sequence(token_ids=list(new.token_ids), prompt_len=new.prompt_len, sampling=new.sampling)
        for chunk in plan.chunks:
            s = self.sequences[chunk.seq_id]
            s.token_ids += chunk.appended
            s.blocks += chunk.new_blocks

    def _answer(self, step: int, chunks: list[Chunk], hidden_TD: torch.Tensor) -> StepResult:
        first, ends, seq_ids, prompts = 0, [], [], {}
        for chunk in chunks:
            if told := self._prompt_logprobs(chunk, hidden_TD, first):
                prompts[chunk.seq_id] = told
            first += chunk.count
            if chunk.sample:
                ends.append(first - 1)
                seq_ids.append(chunk.seq_id)
        answers = {}
        if ends:
            hidden_RD = _picked(hidden_TD, ends)
            chosen = self.sampler.sample(
                lambda rows: self.model.logits(_picked(hidden_RD, rows)),
                [self.sequences[i] for i in seq_ids],
                lambda rows, count, allowed: self.model.best(_picked(hidden_RD, rows), count, allowed),
            )
            answers = dict(zip(seq_ids, chosen, strict=False))
        telling = [chunk.seq_id for chunk in chunks if chunk.seq_id in answers or chunk.seq_id in prompts]
        return StepResult(step=step, samples=tuple(as_sample(i, answers.get(i), prompts.get(i, ())) for i in telling))

    def _prompt_logprobs(self, chunk: Chunk, hidden_TD: torch.Tensor, first: int) -> tuple[TokenLogprobs, ...]:
        """Of the chunk whose tokens are rows first, first + 1, ... of the step."""
        s = self.sequences[chunk.seq_id]
        count = s.sampling.prompt_logprobs
        rows = min(chunk.start + chunk.count, s.prompt_len - 1) - chunk.start
        if count is None or rows <= 0:
            return ()
        told: tuple[TokenLogprobs, ...] = ()
        for at in range(0, rows, PROMPT_TILE):
            stop = min(at + PROMPT_TILE, rows)
            targets = s.token_ids[chunk.start + at + 1 : chunk.start + stop + 1]
            told += self.sampler.prompt_logprobs(self.model.logits(hidden_TD[first + at : first + stop]), targets, count)
        return told


def _reduce(comm: Communicator, floats: Op) -> Reduce:
    """Adds partial sums over the ranks: of integers before they are scaled, of floats by `floats`."""

    def run(partial: Partial) -> torch.Tensor:
        if isinstance(partial, Unscaled):
            return partial.scaled(comm.all_reduce(partial.total))
        return floats(partial)

    return run


def _tree_reduce(comm: Communicator, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """Adds partial sums in float32 along a tree of the ranks, and rounds once."""
    tree = TreeReduce(comm)
    return lambda partial: tree.all_reduce(partial).to(dtype)


def _picked(rows_RD: torch.Tensor, picked: Rows[int]) -> torch.Tensor:
    """These rows, ascending and each once; without a copy if all are picked."""
    return rows_RD if len(picked) == len(rows_RD) else rows_RD[list(picked)]
