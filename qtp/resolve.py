"""From what was asked to what is run: every choice left open in an EngineConfig is made here, from the model alone, the same
on every rank. Also the arithmetic of memory that `qtp.plan` prints."""

import os
from dataclasses import dataclass, replace
from importlib.util import find_spec

from qtp.config import EngineConfig, ModelConfig
from qtp.kernels.extension import why_not
from qtp.layout.leaves import check_leaves
from qtp.layout.split import Grid
from qtp.weights.assemble import check_quantization
from qtp.weights.names import declare

ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
_KV_CACHE_GIB = 4.0  # of a rank on a CPU
_HOST_MEMORY = ("shm", "mpi", "hierarchical", "hierarchical+mpi")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankShare:
    """What one rank holds. experts: how many of each sparse layer; weight_bytes and kv_bytes_per_token in the run's dtype."""

    rank: int
    query_heads: range
    kv_heads: range
    mlp_columns: int
    experts: int
    vocab: int
    weight_bytes: int
    kv_bytes_per_token: int


def shares(model: ModelConfig, grid: Grid, dtype: str, *, expanded: bool = False) -> list[RankShare]:
    """The share of each rank, by rank. expanded: see `Spec.bytes`; so it is on cards."""
    specs, item = declare(model), ITEM_SIZE[dtype]
    by_name = {spec.name: spec for spec in specs}
    quantized_cache = model.quantization is not None and model.quantization.kv_cache is not None
    sparse = min(model.moe.layers, default=None) if model.moe else None
    dense = next((i for i in range(model.num_layers) if not model.moe or i not in model.moe.layers), None)

    def share(rank: int) -> RankShare:
        kv = model.heads.kv(rank, grid)
        experts = range(model.moe.num_experts) if model.moe else ()
        downs = [by_name[f"layers.{sparse}.moe.experts.{e}.down.weight"] for e in experts if sparse is not None]
        column = f"layers.{dense}.mlp.down.weight" if dense is not None else f"layers.{sparse}.moe.shared.down.weight"
        return RankShare(
            rank=rank,
            query_heads=model.heads.query(rank, grid),
            kv_heads=kv,
            mlp_columns=by_name[column].shape(rank, grid)[1],
            experts=sum(spec.elements(rank, grid) > 0 for spec in downs),
            vocab=by_name["embed.weight"].shape(rank, grid)[0],
            weight_bytes=sum(spec.bytes(rank, grid, item, expanded=expanded) for spec in specs),
            kv_bytes_per_token=2 * model.num_layers * len(kv) * model.head_dim * (1 if quantized_cache else item),
        )

    return [share(rank) for rank in range(grid.size)]


def context_limit(model: ModelConfig) -> int:
    """The longest context in tokens that the model's positions are made for."""
    return max(model.max_position, int(model.rope.factor * model.rope.original_max_position))


def resolve(
    config: EngineConfig,
    model: ModelConfig,
    world_size: int,
    *,
    cuda: bool,
    cpu_communicator: str = "gloo",
    cuda_communicator: str = "nccl",
) -> EngineConfig:
    """`config` with tp, dtype, device, communicator, kernels, max_model_len and num_kv_blocks settled; the last stays None on a
    card, whose memory tells it once the weights are there, unless num_kv_blocks or kv_cache_gib is given.

    world_size: what a launcher started, 1 for a lone process; cuda: whether there is such a device; cpu_communicator,
    cuda_communicator: what several ranks on these devices talk over unless they are told. Raises ValueError for a choice that
    cannot be.
    """
    tp = world_size if config.tp == -1 else config.tp
    if tp < 1:
        raise ValueError(f"tp {config.tp} must be at least 1, or -1 for the world size")
    if world_size > 1 and config.launcher != "auto":
        raise ValueError(
            f"launcher {config.launcher!r} starts the ranks, and this process is itself one of {world_size} that a launcher "
            "started; leave --launcher out"
        )
    if world_size > 1 and tp != world_size:
        raise ValueError(f"tp {tp} disagrees with the world size {world_size} of the launcher; start {tp} ranks, or leave tp out")
    model.check_world(tp)
    config = replace(config, tp=tp)
    grid = config.grid()
    if config.deterministic:
        check_leaves(grid)
    check_quantization(model, grid)
    if model.moe is not None and config.moe_ep > model.moe.num_experts:
        raise ValueError(
            f"moe_ep {config.moe_ep} is more than the {model.moe.num_experts} experts; use {model.moe.num_experts} or less"
        )
    limit = config.max_position_embeddings or context_limit(model)
    length = config.max_model_len or limit
    if length > limit:
        raise ValueError(f"max_model_len {length} is beyond the {limit} positions of this model; lower it to {limit} or less")
    device = config.device if config.device != "auto" else ("cuda" if cuda else "cpu")
    if device == "cuda" and not cuda:
        raise ValueError("device cuda: no CUDA device was found by this torch; choose cpu")
    dtype = model.dtype if config.dtype == "auto" else config.dtype
    if dtype is None:
        raise ValueError(f"{config.model}: config.json does not say the dtype of the weights; give --dtype")
    communicator = config.communicator
    if communicator == "auto":
        communicator = "solo" if tp == 1 else {"cpu": cpu_communicator, "cuda": cuda_communicator, "npu": "hccl"}[device]
    if device != "cpu" and communicator in _HOST_MEMORY:
        raise ValueError(
            f"communicator {communicator!r} works on cpu, not on device {device}; choose auto, or gloo, which goes through host "
            "memory"
        )
    if device != "cuda" and communicator == "cuda_ipc":
        raise ValueError(f"communicator 'cuda_ipc' works on cuda, not on device {device}; choose auto")
    config = replace(
        config, dtype=dtype, device=device, communicator=communicator, max_model_len=length, kernels=_kernels(config, device)
    )
    blocks = config.num_kv_blocks
    if blocks is None:
        if device != "cpu" and config.kv_cache_gib is None:
            return config
        blocks = _kv_blocks(config, model, grid)
    if device == "cpu" and (needed := blocks * _block_bytes(config, model, grid)) > machine_bytes():
        has = machine_bytes() / 2**30
        raise ValueError(f"{blocks} KV blocks need {needed / 2**30:.1f} GiB, and this machine has {has:.1f}; lower num_kv_blocks")
    return replace(config, num_kv_blocks=blocks)


def _kernels(config: EngineConfig, device: str) -> str:
    reason = why_not() if device == "cpu" else f"they run on cpu, not on device {device}"
    if config.kernels == "native" and reason is not None:
        raise ValueError(f"kernels 'native': {reason}; or choose torch")
    if config.kernels == "triton" and device != "cuda":
        raise ValueError(f"kernels 'triton' run on cuda, not on device {device}; choose auto, or --device cuda")
    if config.kernels == "triton" and why_no_triton() is not None:
        raise ValueError(f"kernels 'triton': {why_no_triton()}; or choose torch")
    if config.deterministic and (reason is not None or config.kernels == "torch"):
        raise ValueError(f"deterministic needs the native kernels: {reason or 'torch was chosen'}; or leave it away")
    if config.kernels != "auto":
        return config.kernels
    return "native" if reason is None else "triton" if device == "cuda" and why_no_triton() is None else "torch"


def why_no_triton() -> str | None:
    """Why kernels in Triton cannot be had, in words; None if they can. The package is looked for, not imported."""
    return None if find_spec("triton") is not None else "the package triton is not installed; pip install triton"


def machine_bytes() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _block_bytes(config: EngineConfig, model: ModelConfig, grid: Grid) -> int:
    """Bytes of a KV block on the rank that holds most."""
    return config.block_size * max(share.kv_bytes_per_token for share in shares(model, grid, config.dtype))


def blocks_of(config: EngineConfig) -> int:
    """KV blocks that a sequence of max_model_len tokens takes; `config` is resolved."""
    assert config.max_model_len is not None
    return -(-config.max_model_len // config.block_size)


def _kv_blocks(config: EngineConfig, model: ModelConfig, grid: Grid) -> int:
    """As many blocks as max_num_seqs sequences of max_model_len tokens could use, within kv_cache_gib on the fullest rank."""
    per_block, gib = _block_bytes(config, model, grid), config.kv_cache_gib or _KV_CACHE_GIB
    fits = int(gib * 2**30) // per_block
    if fits < 1:
        raise ValueError(f"kv_cache_gib {gib:g} is less than one block of {per_block} bytes; raise it or lower block_size")
    return min(config.max_num_seqs * blocks_of(config), fits)


def describe(config: EngineConfig, model: ModelConfig) -> list[str]:
    """What was chosen: the run in one line, then each rank's share, then the waste of an uneven cut."""
    grid = config.grid()
    rows = shares(model, grid, config.dtype)
    weights = [row.weight_bytes for row in rows]
    experts = f" (moe_ep {grid.moe_ep}, moe_tp {grid.moe_tp})" if model.moe is not None else ""
    blocks = f"KV blocks of {config.block_size} tokens"
    if config.num_kv_blocks is None:
        kv = f"{blocks} from gpu_memory_utilization {config.gpu_memory_utilization:g}"
    else:
        size = config.num_kv_blocks * _block_bytes(config, model, grid) / 2**20
        kv = f"{config.num_kv_blocks} {blocks} ({size:.1f} MiB on the fullest rank)"
    head = (
        f"tp {config.tp}{experts}, {config.dtype} on {config.device}, communicator {config.communicator}, "
        f"{config.kernels} kernels, {kv}, context {config.max_model_len}"
    )
    waste = f"the fullest rank holds {max(weights) * len(weights) / sum(weights):.2f} times the mean"
    if config.deterministic:
        head += ", deterministic"
    return [head, *(_row(row, model.moe is not None) for row in rows), waste]


def _row(s: RankShare, sparse: bool) -> str:
    return (
        f"rank {s.rank}: query heads {s.query_heads.start}-{s.query_heads.stop - 1}, "
        f"KV heads {s.kv_heads.start}-{s.kv_heads.stop - 1}, {s.mlp_columns} columns, "
        f"{f'{s.experts} experts, ' if sparse else ''}{s.weight_bytes / 2**20:.1f} MiB weights, "
        f"{s.kv_bytes_per_token} KV bytes a token"
    )
