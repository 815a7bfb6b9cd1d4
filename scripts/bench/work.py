"""What a model's forward must read and multiply at least, from the headers of its checkpoint."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from qtp.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """dense, routed: bytes of the weights that every step reads, and of all routed experts together; the embedding counts only
    where it is the head too, the head in both. Weights and KV are two bytes an element."""

    model: ModelConfig
    dense: int
    routed: int

    @classmethod
    def of(cls, folder: Path) -> "Work":
        """Raises ValueError for a folder that is no bfloat16 checkpoint of a known model."""
        model, dense, routed = ModelConfig.load(folder), 0, 0
        for file in folder.glob("*.safetensors"):
            with file.open("rb") as f:
                header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
            for name, tensor in header.items():
                if name == "__metadata__" or (name.startswith("model.embed_tokens.") and not model.tie_word_embeddings):
                    continue
                if tensor["dtype"] != "BF16":
                    raise ValueError(f"{file}: {name} is {tensor['dtype']}; make the checkpoint with --dtype bfloat16")
                if ".mlp.experts." in name:
                    routed += 2 * prod(tensor["shape"])
                elif name != "lm_head.weight" or not model.tie_word_embeddings:
                    dense += 2 * prod(tensor["shape"])
        if not dense:
            raise ValueError(f"{folder}: holds no weights; make a checkpoint with scripts/make_checkpoint.py")
        return cls(model=model, dense=dense, routed=routed)

    @property
    def vocab(self) -> int:
        return self.model.vocab_size

    def step_bytes(self, batch: int, context: float) -> float:
        """Bytes that a decode step of `batch` sequences of `context` tokens each reads: every weight once, of the routed experts
        as many as that many tokens choose on the average if each chooses at random, and K and V of the context."""
        kv = self.model.num_layers * 2 * self.model.num_kv_heads * self.model.head_dim * 2
        experts = 0.0
        if (moe := self.model.moe) is not None:
            experts = self.routed * (1 - (1 - moe.top_k / moe.num_experts) ** batch)
        return self.dense + experts + batch * context * kv

    def prefill_operations(self, batch: int, length: int) -> float:
        """Multiplications and additions of the matrix products of a prefill of `batch` prompts: 2 for each weight and token, the
        head for the last token of each prompt only, and causal attention."""
        head = 2 * self.model.vocab_size * self.model.hidden_size
        share = self.model.moe.top_k / self.model.moe.num_experts if self.model.moe is not None else 0.0
        linear = (self.dense - head + self.routed * share) * batch * length
        attention = self.model.num_layers * self.model.num_heads * self.model.head_dim * 2 * length * (length + 1) * batch
        return linear + head * batch + attention
