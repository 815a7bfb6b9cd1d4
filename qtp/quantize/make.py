"""The run itself: reads a float checkpoint block by block, and writes the quantized one. All ranks take part.

Ranks share out the samples of calibration and the layers to quantize; each writes what it made to where it belongs in the files.
What is written does not depend on how many ranks there are.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from collectives.communicator import Communicator
from qtp.config import ModelConfig, read_json
from qtp.layout.split import Grid
from qtp.quantization import C8, FAQUANT, FLOAT
from qtp.quantize import arithmetic
from qtp.quantize.arithmetic import Activation
from qtp.quantize.forward import Calibration
from qtp.quantize.layers import Linear, disable_more, forms, in_one_form, linears
from qtp.quantize.linear import Made, Maker, bias_of, tensors_of
from qtp.quantize.observe import Histograms, Seen
from qtp.quantize.raw import read
from qtp.quantize.settings import STATIC, Settings
from qtp.quantize.smooth import Change, Smoothing, smooth
from qtp.quantize.write import Planned, WeightFiles, begin, check_target, finish, undo, write_json
from qtp.weights.dtypes import TORCH_DTYPES
from qtp.weights.loader import Shard
from qtp.weights.names import declare
from qtp.weights.store import Store
from qtp.weights.verify import verify

COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "generation_config.json"),
)
_FEW = 32  # tokens of an expert; below that, its ranges come from all tokens of its layer
_COPY = 8 << 20
_WHOLE = Grid(size=1, moe_ep=1, moe_tp=1)
_WORDS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A float checkpoint. dtype: of its model, as config.json or else the embedding says."""

    folder: Path
    config: ModelConfig
    store: Store
    dtype: str

    @classmethod
    def open(cls, folder: Path) -> "Source":
        """Raises ValueError for what is no whole float checkpoint."""
        config = ModelConfig.load(folder)
        if config.quantization is not None:
            raise ValueError(
                f"{folder}: is quantized already ({config.quantization.word}); give the float checkpoint that it was made of"
            )
        store = Store(folder, config.weight_files)
        verify(store, declare(config), _WHOLE)
        stored = store.entries["model.embed_tokens.weight"].dtype
        return cls(folder=folder, config=config, store=store, dtype=config.dtype or _WORDS.get(stored, "float32"))


@dataclass(slots=True)
class Outcome:
    """What was made. forms: the type of each linear layer; errors: of each quantized one; kv_errors: of keys and values by block;
    strained: max |x| / std(x) of inputs by layer, if that was asked for; unreached: experts that no token of the calibration was
    routed to."""

    forms: dict[str, str]
    errors: dict[str, Made] = field(default_factory=dict)
    kv_errors: list[tuple[float, float]] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    strained: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0


def make(
    source: Source,
    target: Path,
    asked: Settings,
    samples: Sequence[Sequence[int]],
    comm: Communicator,
    *,
    dtype: torch.dtype = torch.float32,
    max_bytes: int = 5_000_000_000,
    finishing: Callable[[Outcome, Path], None] = lambda outcome, folder: None,
) -> Outcome:
    """Writes `target`, and returns on rank 0 what came of it. samples: token ids, none if `asked` needs no calibration; dtype:
    in which the model runs over them. finishing: is called on rank 0 with the folder to which more files may be written, before
    anything appears in `target`. Raises ValueError for what cannot be, and leaves nothing behind."""
    chosen = forms(source.config, asked)
    check_target(source.folder, target)
    assert bool(samples) == asked.calibrated
    started = time.monotonic()
    outcome = Outcome(chosen, samples=len(samples), tokens=sum(map(len, samples)))
    if asked.disable_level:
        outcome.strained = _strains(source, chosen, samples, comm, dtype)
        outcome.forms = disable_more(chosen, outcome.strained, asked.disable_level)
    comm.barrier()  # until all have seen an empty target
    existed = target.exists()
    try:
        partial = begin(target) if comm.rank == 0 else target / ".partial"
        run = _Run(source, partial, asked, outcome, comm, max_bytes)
        if comm.rank == 0:
            run.files.create()
        comm.barrier()
        calibration = Calibration(source.config, source.store, samples, comm, dtype) if asked.calibrated else None
        run.everything(calibration)
        run.close()
        outcome.seconds = time.monotonic() - started
        source.store.check_unchanged()
        if comm.rank == 0:
            _write_rest(source, partial, asked, outcome, run.planned)
            finishing(outcome, partial)
            written = ModelConfig.load(partial)
            verify(Store(partial, written.weight_files), declare(written), _WHOLE)
            finish(target)
        comm.barrier()
    except BaseException:
        if comm.rank == 0:
            undo(target, existed)
        raise
    return outcome


def _strains(
    source: Source, chosen: Mapping[str, str], samples: Sequence[Sequence[int]], comm: Communicator, dtype: torch.dtype
) -> dict[str, float]:
    """max |x| / std(x) of the input of each linear layer that is to be quantized, by its name."""
    calibration = Calibration(source.config, source.store, samples, comm, dtype)
    found: dict[str, float] = {}
    for layer in tqdm(
        range(source.config.num_layers), desc="disable_level", disable=None if comm.rank == 0 else True, leave=False
    ):
        own = [linear for linear in linears(source.config) if linear.layer == layer and chosen[linear.name] != FLOAT]
        recorder = calibration.recorder({linear.own: linear.shape[1] for linear in own})
        calibration.step(layer, calibration.load(layer), recorder, keep=False)
        seen = recorder.seen(comm)
        found |= {linear.name: seen[linear.own].strain for linear in own if linear.own in seen}
    return found


class _Run:
    def __init__(
        self, source: Source, partial: Path, asked: Settings, outcome: Outcome, comm: Communicator, max_bytes: int
    ) -> None:
        self.source, self.asked, self.outcome, self.comm = source, asked, outcome, comm
        self.every = linears(source.config)
        self.quantized = [linear for linear in self.every if outcome.forms[linear.name] != FLOAT]
        self.planned = tuple(_plan(source, asked, outcome.forms))
        self.files = WeightFiles(partial, asked.stem, self.planned, max_bytes)
        self.maker = Maker(asked, outcome.forms, source.config, source.store, self.files, source.dtype)
        self._errors = torch.zeros(len(self.quantized), 4, dtype=torch.float64)
        self._kv_errors = torch.zeros(source.config.num_layers, 2, dtype=torch.float64)

    def everything(self, calibration: Calibration | None) -> None:
        replaced = {f"{linear.name}.{suffix}" for linear in self.quantized for suffix in ("weight", "bias")}
        for name in self._mine([(name, _bytes(self.source.store, name)) for name in self._copies() if name not in replaced]):
            self._copy(name)
        layers = [*range(self.source.config.num_layers), None]
        for layer in tqdm(layers, desc="layers", disable=None if self.comm.rank == 0 else True, leave=False):
            own = [linear for linear in self.quantized if linear.layer == layer]
            seen: Mapping[str, Seen] = {}
            smoothing = Smoothing({}, {})
            inputs: Mapping[str, Activation] = {}
            if calibration is not None and layer is not None:
                seen, smoothing, inputs = self._calibrated(layer, own, calibration)
            elif calibration is not None and self.asked.head_kind in STATIC and own:
                seen, inputs = self._calibrated_head(own[0], calibration)
            for linear in self._mine([(linear, linear.shape[0] * linear.shape[1]) for linear in own]):
                change, before = smoothing.changes.get(linear.name, Change()), seen.get(linear.own)
                made = self.maker.make(linear, change, before and change.input(before), inputs.get(linear.own))
                self._errors[self.quantized.index(linear)] = torch.tensor(made.sums, dtype=torch.float64)

    def close(self) -> None:
        """All ranks' errors come together. Asserts that every byte was written."""
        self.files.close()
        self.maker.close()
        errors, kv = (self.comm.all_reduce(x.to(self.comm.device)).cpu() for x in (self._errors, self._kv_errors))
        written = int(self.comm.all_reduce(torch.tensor([self.files.written], device=self.comm.device)))
        assert written == self.files.total, (written, self.files.total)
        self.outcome.errors = {linear.name: Made(tuple(row)) for linear, row in zip(self.quantized, errors.tolist(), strict=True)}
        self.outcome.kv_errors = [(k, v) for k, v in kv.tolist()] if self.asked.kv is not None else []

    def _calibrated(
        self, layer: int, own: Sequence[Linear], calibration: Calibration
    ) -> tuple[dict[str, Seen], Smoothing, dict[str, Activation]]:
        """What was seen, how the block is smoothed, and the scales of static inputs by `Linear.own`."""
        config, asked = self.source.config, self.asked
        widths = {linear.own: linear.shape[1] for linear in own} | self._kv_widths(layer)
        recorder = calibration.recorder(widths)
        shard = calibration.load(layer)
        experts = {linear.own for linear in own if linear.expert is not None}
        histograms = asked.kind in STATIC and asked.act_method != 1
        calibration.step(layer, shard, recorder, keep=bool(experts) or histograms)
        seen = recorder.seen(self.comm)
        probe = sorted(name for name in experts if name not in seen or seen[name].tokens < _FEW)
        if probe:
            self.outcome.unreached += [name for name in probe if name not in seen and name.endswith("gate_up")]
            some = calibration.recorder({name: widths[name] for name in probe})
            calibration.again(layer, shard, some, probe)
            seen |= some.seen(self.comm)
        by_name = {linear.name: linear for linear in self.every if linear.layer == layer}

        def weights(linear: Linear) -> Tensor:
            return shard[f"{linear.own}.weight"][linear.first : linear.first + linear.shape[0]].float().cpu()

        every = list(by_name.values())
        smoothing = smooth(config, asked, every, self.outcome.forms, seen, weights, lambda name: self._norm(name))
        if self.comm.rank == 0:
            for name, weight in smoothing.norms.items():
                self.files.put(f"{name}.module.weight", weight)
                self.files.put(f"{name}.module.bias", torch.zeros_like(weight))
            self._write_kv(layer, seen, smoothing.changes.get(f"model.layers.{layer}.self_attn.v_proj", Change()))
        inputs = self._inputs(layer, own, seen, smoothing, calibration, shard) if asked.kind in STATIC else {}
        return seen, smoothing, inputs

    def _calibrated_head(self, head: Linear, calibration: Calibration) -> tuple[dict[str, Seen], dict[str, Activation]]:
        """What lm_head was given, and the scale of it."""
        recorder = calibration.recorder({head.own: head.shape[1]})
        calibration.end(head.own, recorder)
        seen = recorder.seen(self.comm)
        low, high = float(seen[head.own].low.min()), float(seen[head.own].high.max())
        return seen, {head.own: arithmetic.activation(low, high)}

    def _inputs(
        self,
        layer: int,
        own: Sequence[Linear],
        seen: Mapping[str, Seen],
        smoothing: Smoothing,
        calibration: Calibration,
        shard: Shard,
    ) -> dict[str, Activation]:
        ranges: dict[str, tuple[Tensor | None, float, float]] = {}
        for linear in own:  # parts of one layer have one input, and so one change of it
            change = smoothing.changes.get(linear.name, Change())
            after = change.input(seen[linear.own])
            ranges[linear.own] = change.columns, float(after.low.min()), float(after.high.max())
        if self.asked.act_method == 1:
            return {name: arithmetic.activation(low, high) for name, (_, low, high) in ranges.items()}
        watch = Histograms(ranges)
        probe = [name for name in ranges if ".experts." in name and seen[name].tokens < _FEW]
        calibration.again(layer, shard, watch, probe)
        counts = watch.counts(self.comm)
        return {
            name: arithmetic.activation(*arithmetic.best_range(counts[name], low, high, self.asked.act_method))
            for name, (_, low, high) in ranges.items()
        }

    def _kv_widths(self, layer: int) -> dict[str, int]:
        if self.asked.kv is None:
            return {}
        config, own = self.source.config, f"layers.{layer}.attention"
        width = config.num_kv_heads * config.head_dim
        widths = {"query.reach": config.num_heads * config.head_dim, "key": width, "key.reach": width, "value": width}
        return {f"{own}.{name}": width for name, width in widths.items()}

    def _write_kv(self, layer: int, seen: Mapping[str, Seen], value: Change) -> None:
        """The scales of what goes into the KV cache; `value` is what smoothing does to v_proj."""
        if self.asked.kv is None:
            return
        config, own, theirs = self.source.config, f"layers.{layer}.attention", f"model.layers.{layer}.self_attn"
        of = {"k": seen[f"{own}.key"], "v": seen[f"{own}.value"]}
        if value.rows is not None:
            of["v"] = of["v"].divided(value.rows)
        ranges = {"k": seen[f"{own}.key.reach"], "v": of["v"]}
        for i, n in enumerate("kv"):
            low, high = ranges[n].low, ranges[n].high
            if self.asked.kv == C8:
                scale, offset = arithmetic.channels(low, high)
                self.files.put(f"{theirs}.{n}_proj.kv_cache_scale", scale)
                self.files.put(f"{theirs}.{n}_proj.kv_cache_offset", offset)
            else:
                by_head = arithmetic.heads(low, high, config.num_kv_heads)
                scale, offset = by_head.expand(-1, config.head_dim).flatten(), torch.zeros(1)
                self._put_fa(f"{theirs}.fa_{n}", by_head)
            x = of[n].rows
            rounded = ((x / scale + offset).round().clamp(-128, 127) - offset) * scale
            self._kv_errors[layer, i] = float((x - rounded).norm() / x.norm().clamp(min=1e-30))
        if self.asked.kv == FAQUANT:
            query = seen[f"{own}.query.reach"]
            self._put_fa(f"{theirs}.fa_q", arithmetic.heads(query.low, query.high, config.num_heads))

    def _put_fa(self, name: str, scale: Tensor) -> None:
        self.files.put(f"{name}.scale", scale)
        self.files.put(f"{name}.offset", torch.zeros_like(scale))

    def _norm(self, name: str) -> Tensor:
        x = read(self.source.store, f"{name}.weight")
        word = self.source.store.entries[f"{name}.weight"].dtype
        return x.to(TORCH_DTYPES[word]) if word in ("F16", "BF16") else x

    def _copies(self) -> Iterator[str]:
        return iter(self.source.store.entries)

    def _copy(self, name: str) -> None:
        entry, size = self.source.store.entries[name], _bytes(self.source.store, name)
        rows = entry.shape[0] if entry.shape else 1
        step = max(1, _COPY * rows // max(size, 1))
        for first in range(0, rows, step):
            stop = min(first + step, rows)
            raw = memoryview(bytearray(size // rows * (stop - first)))
            box = (range(first, stop), *map(range, entry.shape[1:])) if entry.shape else ()
            self.source.store.read_into(name, box, raw)
            self.files.put_bytes(name, raw, size // rows * first)

    def _mine(self, jobs: Sequence[tuple[Any, int]]) -> list[Any]:
        """This rank's of (job, cost): the largest first, each to the rank that has least."""
        loads, mine = [0] * self.comm.size, []
        for job, cost in sorted(jobs, key=lambda pair: -pair[1]):
            rank = loads.index(min(loads))
            loads[rank] += cost
            if rank == self.comm.rank:
                mine.append(job)
        return mine


def _bytes(store: Store, name: str) -> int:
    entry = store.entries[name]
    return Planned(name, entry.dtype, entry.shape, FLOAT).size


def _plan(source: Source, asked: Settings, chosen: Mapping[str, str]) -> Iterator[Planned]:
    """Every tensor to be written: those of the source in their order, what quantization adds beside what it is of."""
    config, store = source.config, source.store
    by_name = {linear.name: linear for linear in linears(config) if chosen[linear.name] != FLOAT}
    behind: dict[str, list[Linear]] = {}
    for linear in linears(config):
        behind.setdefault(linear.norm or "", []).append(linear)

    def float32(name: str, *shape: int, kind: str) -> Planned:
        return Planned(name, "F32", shape, kind)

    tied = [] if "lm_head.weight" in store.entries or "lm_head" not in by_name else ["lm_head.weight"]
    for name in [*store.entries, *tied]:
        layer = name.removesuffix(".weight").removesuffix(".bias")
        entry = store.entries.get(name)
        if layer in by_name:
            if name.endswith("weight"):
                yield from tensors_of(by_name[layer], asked, chosen[layer], source.dtype, bias_of(store, by_name[layer]))
        else:
            assert entry is not None
            yield Planned(name, entry.dtype, entry.shape, FLOAT)
        if entry is not None and asked.anti_method and layer in behind and in_one_form(behind[layer], chosen):
            yield from (Planned(f"{layer}.module.{suffix}", entry.dtype, entry.shape, FLOAT) for suffix in ("weight", "bias"))
        part = name.rsplit(".", 2)[-2]
        if asked.kv is None or not name.endswith("_proj.weight") or part[0] not in "qkv" or ".self_attn." not in name:
            continue
        if asked.kv == C8 and part[0] in "kv":
            width = config.num_kv_heads * config.head_dim
            yield from (float32(f"{layer}.kv_cache_{suffix}", width, kind=C8) for suffix in ("scale", "offset"))
        elif asked.kv == FAQUANT:
            heads = config.num_heads if part[0] == "q" else config.num_kv_heads
            own = f"{layer.rsplit('.', 1)[0]}.fa_{part[0]}"
            yield from (float32(f"{own}.{suffix}", heads, 1, kind=FAQUANT) for suffix in ("scale", "offset"))


def _write_rest(source: Source, folder: Path, asked: Settings, outcome: Outcome, planned: Iterable[Planned]) -> None:
    """The description, config.json and the small files of the source."""
    settings: dict[str, Any] = {"group_size": asked.group_size}
    if asked.kv is not None:
        settings |= {"kv_quant_type": C8} if asked.kv == C8 else {"fa_quant_type": FAQUANT}
    about = {"version": "1.0.0", "model_quant_type": asked.kind, **settings}
    write_json(folder / "quant_model_description.json", about | {tensor.name: tensor.kind for tensor in planned})
    for name in COPIED:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    config = read_json(source.folder / "config.json") | {"torch_dtype": source.dtype, "quantization_config": settings}
    if asked.kind != FLOAT:
        config["quantize"] = asked.word
    if outcome.forms["lm_head"] != FLOAT:
        config["tie_word_embeddings"] = False
    write_json(folder / "config.json", config)
