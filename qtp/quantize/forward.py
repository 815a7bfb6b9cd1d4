"""The calibration samples on their way through a model, one block after the other, each loaded when its turn comes.

T tokens of a sample, D hidden.
"""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from collectives.communicator import Communicator
from collectives.solo import Solo
from qtp.attention.backend import AttentionBackend
from qtp.attention.native_backend import NativeAttention
from qtp.attention.torch_backend import TorchAttention
from qtp.batch import Batch, make_batch
from qtp.config import ModelConfig
from qtp.kernels.extension import why_not
from qtp.kernels.interface import Kernels
from qtp.kernels.native_kernels import NativeKernels
from qtp.kernels.torch_kernels import TorchKernels
from qtp.kv.cache import KVCache
from qtp.layers.rope import Rope
from qtp.layout.split import Grid
from qtp.models.qwen2 import Block, Place, block, mlp, norm
from qtp.models.qwen2_moe import moe
from qtp.quantize.observe import LANES, Histograms, Recorder, See, WatchedAttention, WatchedKernels
from qtp.quantize.raw import read
from qtp.resolve import context_limit
from qtp.weights.loader import Shard, load
from qtp.weights.names import declare
from qtp.weights.quantized import Unscaled
from qtp.weights.store import Store

_BLOCK = 128  # tokens of a KV block
_GRID = Grid(size=1, moe_ep=1, moe_tp=1)


class Calibration:
    """This rank's samples: those whose lane is its own. `step` moves them through one block; their hidden states and the weights
    of one block, in `dtype`, are what it holds. Lanes run side by side, each on one thread, instead of threads that wait for one
    another in every operation."""

    def __init__(
        self, config: ModelConfig, store: Store, samples: Sequence[Sequence[int]], comm: Communicator, dtype: torch.dtype
    ) -> None:
        self._config, self._store, self._comm, self._dtype = config, store, comm, dtype
        self._specs = declare(config)
        self._count = len(samples)
        self._longest = max(map(len, samples))
        rope = Rope(config.rope, config.head_dim, comm.device)
        self._turns = rope.frequencies * context_limit(config)
        self._mine: dict[int, tuple[Batch, Tensor, Tensor]] = {}
        self._hidden: dict[int, Tensor] = {}
        self._before: dict[int, Tensor] = {}
        for number, ids in enumerate(samples):
            if number % LANES % comm.size != comm.rank:
                continue
            blocks = tuple(range(-(-len(ids) // _BLOCK)))
            batch = replace(make_batch([(tuple(ids), 0, blocks)], _BLOCK, comm.device), num_decodes=0)
            self._mine[number] = batch, *rope.table(batch.positions_T, len(ids))
            self._hidden[number] = self._embedded(ids)
        self._kernels: Kernels = TorchKernels()
        self._workers = torch.get_num_threads() if comm.device.type == "cpu" else 1
        if comm.device.type == "cpu" and why_not() is None:
            self._kernels = NativeKernels(deterministic=True)

    def load(self, layer: int) -> Shard:
        """The weights of a block by `Spec.name`."""
        specs = [spec for spec in self._specs if spec.name.startswith(f"layers.{layer}.")]
        return load(self._store, specs, 0, _GRID, self._dtype, self._comm.device)

    def step(self, layer: int, shard: Shard, recorder: Recorder, *, keep: bool) -> None:
        """Moves the samples through a block, for the recorder to see. keep: what they were before is kept for `again`."""
        self._before = {number: x.clone() for number, x in self._hidden.items()} if keep else {}
        self._hidden = self._through(layer, shard, recorder, (), self._hidden)

    def again(self, layer: int, shard: Shard, watch: Recorder | Histograms, probe: Collection[str] = ()) -> None:
        """Runs the block of the last `step` once more. probe: as `WatchedKernels`."""
        self._through(layer, shard, watch, probe, {number: x.clone() for number, x in self._before.items()})

    def end(self, name: str, recorder: Recorder) -> None:
        """Shows the recorder, as the input of `name`, what comes after the last norm."""
        shard = load(self._store, [s for s in self._specs if s.name == "norm.weight"], 0, _GRID, self._dtype, self._comm.device)
        run = self._kernels.rms_norm(norm(self._config, shard, "norm"))
        with torch.inference_mode():
            for number, x in self._hidden.items():
                recorder.see(number % LANES, name, run(x))

    def _through(
        self, layer: int, shard: Shard, watch: Recorder | Histograms, probe: Collection[str], hidden: dict[int, Tensor]
    ) -> dict[int, Tensor]:
        lanes = sorted({number % LANES for number in self._mine})
        workers = min(self._workers, max(len(lanes), 1))

        @torch.inference_mode()
        def work(worker: int) -> None:
            mine = lanes[worker::workers]
            for lane in mine:
                run, attention = self._block(layer, shard, partial(watch.see, lane), probe)
                for number, (batch, cos, sin) in self._mine.items():
                    if number % LANES == lane:
                        hidden[number] = run(hidden[number], attention.plan(batch, cos, sin))

        if workers == 1:
            work(0)
        else:
            with ThreadPoolExecutor(workers, "calibration", initializer=torch.set_num_threads, initargs=(1,)) as threads:
                list(threads.map(work, range(workers)))
        return hidden

    def recorder(self, widths: Mapping[str, int]) -> Recorder:
        return Recorder(widths, self._count)

    def _block(self, layer: int, shard: Shard, see: See, probe: Collection[str]) -> tuple[Block, AttentionBackend]:
        config, device = self._config, self._comm.device
        blocks = -(-self._longest // _BLOCK)
        cache = KVCache(1, blocks, _BLOCK, config.num_kv_heads, config.head_dim, self._dtype, device)
        kv_of = tuple(h * config.num_kv_heads // config.num_heads for h in range(config.num_heads))
        native = isinstance(self._kernels, NativeKernels)
        backend: AttentionBackend = NativeAttention(cache, kv_of, device) if native else TorchAttention(cache, kv_of, device)
        attention = WatchedAttention(backend, config.num_kv_heads, self._turns, see)
        names = {id(tensor): name.removesuffix(".weight") for name, tensor in shard.items()}
        place = Place(
            rank=0,
            grid=_GRID,
            comm=Solo(device),
            reduce=_alone,
            kernels=WatchedKernels(self._kernels, names, see, probe),
            attention=attention,
            cuts={},
        )
        own, post_norm = f"layers.{layer}", norm(config, shard, f"layers.{layer}.post_norm")
        if config.moe is not None and layer in config.moe.layers:
            return block(config, shard, place, layer, moe(config.moe, shard, place, f"{own}.moe", post_norm)), attention
        return block(config, shard, place, layer, mlp(shard, place, f"{own}.mlp", post_norm)), attention

    def _embedded(self, ids: Sequence[int]) -> Tensor:
        """[T, D]; reads no more of the embedding than the rows of these ids."""
        name = "model.embed_tokens.weight"
        entry = self._store.entries[name]
        rows = [read(self._store, name, range(i, i + 1)) for i in ids]
        assert entry.shape[1] == self._config.hidden_size
        return torch.cat(rows).to(self._comm.device, self._dtype)


def _alone(partial: Tensor | Unscaled) -> Tensor:
    assert isinstance(partial, Tensor), "weights are in float"
    return partial
