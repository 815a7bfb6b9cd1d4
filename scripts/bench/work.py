"""What a model's forward must read and multiply at least, from the headers of its checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

from qtp.config import ModelConfig
from qtp.layout.spec import COMPRESSED, RUN
from qtp.layout.split import Grid
from qtp.weights.checkpoint import Checkpoint, open_checkpoint
from qtp.weights.names import declare
from qtp.weights.parts import Parts
from qtp.weights.store import ITEM_SIZE, Entry, read_header


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """dense, routed: bytes of the weights that every step reads, and of all routed experts together, as they are stored; the
    embedding counts only where it is the head too. kv_item: bytes of a value in the KV cache."""

    model: ModelConfig
    dense: int
    routed: int
    kv_item: int

    @classmethod
    def of(cls, folder: Path, tp: int | None = None) -> "Work":
        """Of the tensors that a run uses: what lies beside them is not counted. tp: how many ranks are to read them together, if
        that matters: compressed weights are those of all ranks. Reads headers only.

        Raises ValueError for a folder that is no checkpoint of a known model, or was cut for other ranks, and for matrices in
        float that are not bfloat16.
        """
        model, dense, routed = ModelConfig.load(folder), 0, 0
        headers = cache(lambda file: read_header(file)[0])
        with open_checkpoint(folder, model.weight_files, None if tp is None else Grid.of(tp)) as store:
            for spec in declare(model):
                if spec.name == "embed.weight" and not model.tie_word_embeddings:
                    continue
                for part in spec.parts:
                    entry = store.entries.get(part.name) or store.check(part.name, part.shape)
                    if spec.dtype == RUN and len(entry.shape) > 1 and entry.dtype != "BF16":
                        raise ValueError(f"{entry.file}: {part.name} is {entry.dtype}; make the checkpoint with --dtype bfloat16")
                    size = _compressed(store, part.name, headers) if spec.dtype == COMPRESSED else _bytes(entry)
                    if ".mlp.experts." in part.name:
                        routed += size
                    else:
                        dense += size
        quantized_cache = model.quantization is not None and model.quantization.kv_cache is not None
        return cls(model=model, dense=dense, routed=routed, kv_item=1 if quantized_cache else 2)

    @property
    def vocab(self) -> int:
        return self.model.vocab_size

    @property
    def shape(self) -> tuple[int, ...]:
        """What two checkpoints of one model have in common, whatever their formats."""
        model = self.model
        return model.vocab_size, model.hidden_size, model.intermediate_size, model.num_layers, model.num_heads, model.num_kv_heads

    def kv_bytes(self, tokens: float) -> float:
        """K and V of so many tokens."""
        return tokens * self.model.num_layers * 2 * self.model.num_kv_heads * self.model.head_dim * self.kv_item

    def weight_bytes(self, batch: int) -> float:
        """Bytes of weights that a decode step of `batch` sequences reads: every weight once, of the routed experts as many as
        that many tokens choose on the average if each chooses at random."""
        if (moe := self.model.moe) is None:
            return self.dense
        return self.dense + self.routed * (1 - (1 - moe.top_k / moe.num_experts) ** batch)

    def step_bytes(self, batch: int, context: float) -> float:
        """Bytes that a decode step of `batch` sequences of `context` tokens each reads: weights, and K and V of the context."""
        return self.weight_bytes(batch) + self.kv_bytes(batch * context)

    def prefill_operations(self, batch: int, length: int) -> float:
        """Multiplications and additions of the matrix products of a prefill of `batch` prompts: 2 for each weight and token, the
        head for the last token of each prompt only, and causal attention. Of a bfloat16 checkpoint: each weight has 2 bytes."""
        head = 2 * self.model.vocab_size * self.model.hidden_size
        share = self.model.moe.top_k / self.model.moe.num_experts if self.model.moe is not None else 0.0
        linear = (self.dense - head + self.routed * share) * batch * length
        attention = self.model.num_layers * self.model.num_heads * self.model.head_dim * 2 * length * (length + 1) * batch
        return linear + head * batch + attention


def _bytes(entry: Entry) -> int:
    return prod(entry.shape) * ITEM_SIZE[entry.dtype]


def _compressed(store: Checkpoint, name: str, headers: Callable[[Path], dict[str, Entry]]) -> int:
    """Bytes of the streams of a compressed weight (docs/w8a8sc.md), those of all ranks; what several ranks hold counts once."""
    if not isinstance(store, Parts):
        raise ValueError(f"{store.folder}: {name} does not lie in parts; make the folder with python -m qtp.sparse_compressor")
    own, total = name.removesuffix(".weight"), 0
    for piece in {piece.box: piece for piece in store.pieces[name]}.values():
        lying = headers(piece.store.entries[name].file)
        total += sum(_bytes(lying[stream]) for stream in (name, f"{own}.index", f"{own}.info"))
    return total
