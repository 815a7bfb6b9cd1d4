"""One rank: the only place where layout, weights, cache, attention, model and sampling are put together."""

import logging
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Rows
from pathlib import Path

import torch
from tqdm import tqdm

from collectives.communicator import Communicator
from collectives.tree import TreeReduce
from qtp.attention.backend import AttentionBackend
from qtp.attention.native_backend import NativeAttention
from qtp.attention.torch_backend import TorchAttention
from qtp.batch import make_batch
from qtp.config import EngineConfig, ModelConfig
from qtp.kernels.interface import Kernels, Op, Reduce
from qtp.kernels.native_kernels import NativeKernels
from qtp.kernels.torch_kernels import TorchKernels
from qtp.kv.cache import KVCache
from qtp.kv.scales import kv_scales
from qtp.layout.leaves import row_cuts
from qtp.layout.split import even
from qtp.memory import ALLOCATING, BEGINNING, CAPTURING, MEASURING, READING, STEPPING, kv_blocks, told
from qtp.models import FAMILIES, Place
from qtp.weights.assemble import assemble
from qtp.weights.checkpoint import open_checkpoint
from qtp.weights.dummy import dummy
from qtp.weights.loader import load
from qtp.weights.names import declare
from qtp.weights.quantized import Unscaled
from qtp.weights.verify import verify
from qtp.wire.messages import Chunk, Ready, Sample, StepPlan, StepResult, TokenLogprobs
from qtp.worker.graphs import Decode, DecodeGraphs, Told, buckets
from qtp.worker.memory import card_of, first_steps, largest_step, measure, naming_memory
from qtp.worker.sampling import PROMPT_TILE, Sampler, as_sample
from qtp.worker.sequence import Sequence

log = logging.getLogger("qtp")


class Worker:
    """Reads this rank's shard and runs steps. `config` is resolved (see `qtp.resolve`) and the same on every rank.

    Raises ValueError, before any weight is read, if the checkpoint does not fit `model_config`; also where the device's memory
    does not do, then and in every step. num_kv_blocks: of this run, also where `config` leaves them to what is measured here;
    the same on every rank.
    """

    @naming_memory
    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        comm: Communicator,
        progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        grid, dtype, device = config.grid(), getattr(torch, config.dtype), comm.device
        self.doing, self.device = READING, device
        specs = declare(model_config)
        bytes_read = 0
        if config.load_format == "dummy":
            tensors = dummy(specs, comm.rank, grid, dtype, device)
        else:
            with open_checkpoint(Path(config.model), model_config.weight_files, grid, comm.rank) as store:
                verify(store, specs, grid)
                tensors = load(store, specs, comm.rank, grid, dtype, device, progress)
            bytes_read = store.bytes_read
        shard = assemble(model_config, tensors, comm.rank, grid)
        query, kv = model_config.heads.query(comm.rank, grid), model_config.heads.kv(comm.rank, grid)
        group = model_config.num_heads // model_config.num_kv_heads
        self.doing = ALLOCATING
        cache = KVCache(
            model_config.num_layers,
            config.num_kv_blocks or 1,
            config.block_size,
            len(kv),
            model_config.head_dim,
            dtype,
            device,
            kv_scales(model_config, tensors),
        )
        self.doing = READING
        kv_of = tuple(h // group - kv.start for h in query)
        kernels, attention = _kernels(config, cache, kv_of, device)
        place = Place(
            rank=comm.rank,
            grid=grid,
            comm=comm,
            reduce=_reduce(comm, _tree_reduce(comm, dtype) if config.deterministic else comm.all_reduce),
            kernels=kernels,
            attention=attention,
            cuts=row_cuts(specs, comm.rank, grid) if config.deterministic else {},
        )
        self.comm, self.cache = comm, cache
        self.model = FAMILIES[model_config.family](model_config, shard, place)
        sizes = [len(even(model_config.vocab_size, grid.size, rank)) for rank in range(grid.size)]
        self.sampler = Sampler(comm, sizes, min(config.vocab_limit or model_config.vocab_size, model_config.vocab_size))
        self.sequences: dict[int, Sequence] = {}
        self._begun: deque[StepResult | tuple[int, list[int], Told]] = deque()
        self._rows: dict[int, int] = {}  # of the sequences in the last decode step
        self.ready = Ready(
            rank=comm.rank, bytes_read=bytes_read, weight_bytes=sum(t.numel() * t.element_size() for t in tensors.values())
        )
        del tensors, shard  # what kernels have brought into another form is not held twice while memory is measured
        self.graphs: DecodeGraphs | None = None
        self.num_kv_blocks = config.num_kv_blocks or self._grow(config, model_config.vocab_size)
        if config.kernels == "triton" and _compiles(device):
            self.doing = BEGINNING
            for plan in first_steps(config, model_config.vocab_size):
                self.execute(plan)
        self.graphs = self._captured(config, kernels, model_config.hidden_size)
        self.doing = STEPPING

    def _captured(self, config: EngineConfig, kernels: Kernels, hidden_size: int) -> DecodeGraphs | None:
        """Graphs of decode steps, with Triton's kernels, for as many sequences as the ranks can sum within one; None for none."""
        if config.kernels != "triton" or config.enforce_eager or not _has_graphs(self.device):
            return None
        summed = max(4 * hidden_size, 16 * self.comm.size)  # bytes of a sequence: of a wide sum, of the ranks' best
        sizes = [size for size in buckets(config.max_num_seqs) if self.comm.captures(size * summed)]
        if not sizes:
            return None
        waiting = self.comm.all_reduce(torch.tensor([float(kernels.waits)], device=self.device))
        if bool(waiting):  # on one rank: what it holds of the experts may be of another type
            if self.comm.rank == 0:
                log.info("no CUDA graphs: experts of this type go one by one, and the host must know which of them in each step")
            return None
        assert config.max_model_len is not None
        self.doing = CAPTURING
        return DecodeGraphs(
            self.model,
            sizes,
            allowed=self.sampler.allowed_here,
            choose=self.sampler.best_of_all,
            blocks=self.num_kv_blocks,
            block_size=config.block_size,
            max_model_len=config.max_model_len,
            device=self.device,
            progress=lambda sizes: tqdm(sizes, desc="CUDA graphs", leave=False, disable=self.comm.rank != 0),
        )

    def _grow(self, config: EngineConfig, vocab_size: int) -> int:
        """Gives the cache, so far of one block, what the card has room for. Every rank must call it. Returns its blocks."""
        self.doing, plans = MEASURING, largest_step(config, vocab_size)
        uses = measure(
            card_of(self.device),
            self.comm,
            lambda: [self.execute(plan) for plan in plans],
            weights=self.ready.weight_bytes,
            block=self.cache.block_bytes,
        )
        blocks = kv_blocks(uses, config)
        if self.comm.rank == 0:
            log.info("%s", told(uses, blocks, config))
        self.doing = ALLOCATING
        self.cache.resize(blocks)
        return blocks

    @property
    def ahead(self) -> int:
        """Sequences of a greedy decode step that may be begun before the one before it is finished: its tokens stay on the
        device. 0 if none may."""
        return self.graphs.most if self.graphs is not None else 0

    def execute(self, plan: StepPlan) -> StepResult:
        """Runs one step. Every rank must execute the same plans in the same order; rank 0's result is the one that counts."""
        assert not self._begun, "a step was begun and left"
        self.begin(plan)
        return self.finish()

    def close(self) -> None:
        """To be called before the communicator is closed, whose work graphs hold. No step can be begun any more."""
        if self.graphs is not None:
            self.graphs.close()

    def follow(self, plan: StepPlan) -> None:
        """As `execute`, where nobody reads the result. Where there is `ahead` it waits for no more than the step before."""
        if not self.ahead:
            self.execute(plan)
            return
        while len(self._begun) > 1:
            self.finish()
        self.begin(plan)

    @naming_memory
    @torch.inference_mode()
    def begin(self, plan: StepPlan) -> None:
        """Starts a step; `finish` gives the results in the same order. Where there is `ahead`, the plan of a greedy decode step
        may come before the step before it, which must be one too, is finished: a chunk then begins behind what is known of its
        sequence."""
        self._begun.append(self._start(plan))

    @naming_memory
    @torch.inference_mode()
    def finish(self) -> StepResult:
        """The result of the step that was begun first."""
        begun = self._begun.popleft()
        if isinstance(begun, StepResult):
            self.comm.check()
            return begun
        step, seq_ids, told = begun
        ids = told.ids()
        self.comm.check()  # not before: what failed in the step is known by now
        samples = tuple(Sample(seq_id=i, token=token) for i, token in zip(seq_ids, ids, strict=True))
        return StepResult(step=step, samples=samples)

    def _start(self, plan: StepPlan) -> StepResult | tuple[int, list[int], Told]:
        self._learn(plan)
        chunks = sorted(plan.chunks, key=lambda chunk: chunk.count != 1)
        if not chunks:
            return StepResult(step=plan.step)
        sequences = [self.sequences[chunk.seq_id] for chunk in chunks]
        # one that samples nothing waits for nothing, and so might be followed by a step before its numbers are on the device
        decodes = all(chunk.count == 1 and chunk.sample for chunk in chunks)
        if self.graphs is not None and decodes and len(chunks) <= self.graphs.most:
            greedy = all(s.sampling.only_best for s in sequences)
            hidden_TD = self.graphs.run(self._decodes(chunks), greedy)
            self._rows = {chunk.seq_id: row for row, chunk in enumerate(chunks)}
            if greedy:
                return plan.step, list(self._rows), self.graphs.told(len(chunks))
            return self._answer(plan.step, chunks, hidden_TD)
        parts = []
        for chunk, s in zip(chunks, sequences, strict=True):
            parts.append((tuple(s.token_ids[chunk.start : chunk.start + chunk.count]), chunk.start, tuple(s.blocks)))
        return self._answer(plan.step, chunks, self.model.hidden(make_batch(parts, self.cache.block_size, self.comm.device)))

    def _decodes(self, chunks: list[Chunk]) -> list[Decode]:
        steps = []
        for chunk in chunks:
            s, at = self.sequences[chunk.seq_id], chunk.start
            known = at < len(s.token_ids)
            assert known or (at == len(s.token_ids) and self._begun), f"position {at} of {len(s.token_ids)} tokens"
            row = -1 if known else self._rows[chunk.seq_id]
            steps.append(Decode(token=s.token_ids[at] if known else None, row=row, position=at, table=s.blocks))
        return steps

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


def _compiles(device: torch.device) -> bool:
    """Whether kernels in Triton are compiled for `device` when they are first met."""
    return device.type == "cuda"


def _has_graphs(device: torch.device) -> bool:
    """By itself, so that tests can have a stand-in for graphs on CPUs."""
    return device.type == "cuda"


def _kernels(
    config: EngineConfig, cache: KVCache, kv_of: tuple[int, ...], device: torch.device
) -> tuple[Kernels, AttentionBackend]:
    if config.kernels == "native":
        return NativeKernels(deterministic=config.deterministic), NativeAttention(cache, kv_of, device)
    if config.kernels == "triton":
        from qtp.attention.triton_backend import TritonAttention  # Triton is there on CUDA devices only
        from qtp.kernels.triton_kernels import TritonKernels

        return TritonKernels(device), TritonAttention(cache, kv_of, device)
    return TorchKernels(), TorchAttention(cache, kv_of, device)


def _reduce(comm: Communicator, floats: Op) -> Reduce:
    """Adds partial sums over the ranks: of integers before they are scaled, of floats by `floats`."""

    def run(partial: torch.Tensor | Unscaled) -> torch.Tensor:
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
