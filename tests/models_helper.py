"""Small random checkpoints, what transformers makes of them, and what qtp makes of them: what the tests of correctness compare.

T tokens, V vocabulary. Every weight is random and none is zero, so that a bias, a gate or a scale that is dropped shows.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from device_helper import CHOSEN
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from collectives.communicator import Communicator
from collectives.loopback import loopback
from qtp import LLM, SamplingParams
from qtp.batch import make_batch
from qtp.config import EngineConfig
from qtp.engine.outputs import Logprob
from qtp.llm import prepare
from qtp.worker.worker import Worker

FAMILIES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM)}
MAX_POSITION = 256


def make_checkpoint(folder: Path, family: str, *, seed: int, old_words: bool = False, **config: Any) -> Path:
    """Writes a float32 checkpoint of `family` ('qwen2' or 'qwen2_moe') and returns its folder.

    `config`: keywords of the family's config class in transformers 5. old_words: config.json is written as older releases
    did, with rope_theta, rope_scaling and torch_dtype in place of rope_parameters and dtype, and without layer_types.
    """
    config_class, model_class = FAMILIES[family]
    made = config_class(**{"max_position_embeddings": MAX_POSITION, **config})
    generator = torch.Generator().manual_seed(seed)
    model = model_class(made)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(_random(name, weight.shape, generator))
    model.save_pretrained(folder)
    if old_words:
        _to_old_words(folder / "config.json")
    return folder


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Spread such that logits, router and gates differ clearly between tokens, and blocks weigh more than the embedding."""
    noise = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.5 * noise
    if "norm" in name:
        return 1 + 0.2 * noise
    if "embed_tokens" in name:
        return 0.2 * noise
    scale = 2.0 if name.endswith((".mlp.gate.weight", "lm_head.weight")) else 1.6
    return scale * noise / shape[-1] ** 0.5


def _to_old_words(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    if kind != "default":
        config["rope_scaling"] = {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types")
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def random_ids(count: int, vocab_size: int, seed: int) -> list[int]:
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def oracle(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' own model of a checkpoint, with its plainest attention and experts."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()


@torch.inference_mode()
def oracle_logprobs(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """transformers' log-probabilities of the next token after each of `ids`: [T, V] float32."""
    return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), dim=-1)


def oracle_greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """transformers' greedy continuation of `ids` by `count` tokens, whatever they are."""
    prompt = torch.tensor([ids])
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count)
    return out[0, len(ids) :].tolist()


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What transformers says of a checkpoint: the greedy `tokens` after `prompt`, and the log-probabilities [T, V] at every
    position of prompt and tokens together."""

    folder: Path
    prompt: list[int]
    tokens: list[int]
    logprobs: Tensor

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.tokens


def refer(folder: Path, prompt: list[int], count: int, distinct: int, least_margin: float = 2e-3) -> Reference:
    """A Reference that can be held against another float32 computation: asserts that each greedy choice wins by
    `least_margin`, and that the continuation has at least `distinct` different tokens. Where it fails, choose another seed
    or prompt."""
    model = oracle(folder)
    tokens = oracle_greedy(model, prompt, count)
    logprobs = oracle_logprobs(model, prompt + tokens)
    best, second = logprobs[len(prompt) - 1 : -1].topk(2).values.unbind(dim=1)
    assert (best - second).min() > least_margin, f"near tie {(best - second).min()}: choose another seed or prompt"
    assert len(set(tokens)) >= distinct, f"only {len(set(tokens))} different tokens: choose another seed or prompt"
    return Reference(folder=folder, prompt=prompt, tokens=tokens, logprobs=logprobs)


def open_llm(folder: Path, tp: int, **choices: Any) -> LLM:
    """An LLM of token ids, by default in float32 over loopback threads on the chosen device. Blocks and steps are small, so that
    sequences span several blocks and prompts are prefilled in chunks beside decoding sequences."""
    settings = {"communicator": "loopback", "dtype": "float32", "block_size": 8, "max_num_batched_tokens": 48, "threads": 1}
    return LLM(str(folder), tp, load_tokenizer=False, **{**settings, "device": CHOSEN.name, **choices})


def run(llm: LLM, scored: list[int], prompt: list[int], count: int) -> tuple[Tensor, list[int]]:
    """qtp's log-probabilities after each of `scored` ([T, V] float32) and its greedy continuation of `prompt` by `count` tokens,
    both from one batch."""
    score = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, logprobs=-1, ignore_eos=True)
    greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    first, second = llm.generate([scored, prompt], [score, greedy])
    assert first.prompt_logprobs is not None
    assert first.outputs[0].logprobs is not None
    assert first.prompt_logprobs[0] is None
    rows = [*first.prompt_logprobs[1:], *first.outputs[0].logprobs]
    assert len(rows) == len(scored)
    return torch.stack([_row(row, llm.model_config.vocab_size) for row in rows]), list(second.outputs[0].token_ids)


def _row(told: dict[int, Logprob] | None, vocab_size: int) -> Tensor:
    assert told is not None
    assert len(told) == vocab_size
    values = torch.empty(vocab_size)
    values[torch.tensor(list(told))] = torch.tensor([entry.logprob for entry in told.values()])
    return values


def check(llm: LLM, reference: Reference, tolerance: float = 1e-4) -> None:
    """Asserts that `llm` agrees with transformers: log-probabilities at every position within `tolerance`, greedy tokens
    identical."""
    logprobs, tokens = run(llm, reference.ids, reference.prompt, len(reference.tokens))
    assert logprobs.shape == reference.logprobs.shape
    assert (logprobs - reference.logprobs).abs().max().item() <= tolerance
    assert tokens == reference.tokens


def run_workers(folder: Path, tp: int, ids: list[int], **choices: Any) -> Tensor:
    """qtp's log-probabilities after each of `ids`, [T, V] float32 on the CPU, from `tp` workers in threads on the chosen device
    and nothing above them: for vocabularies so large that a Python object for each entry would be slow."""
    settings = {"dtype": "float32", "communicator": "loopback", "block_size": 8, "num_kv_blocks": len(ids), **choices}
    config, model = prepare(EngineConfig(model=str(folder), tp=tp, device=CHOSEN.name, **settings))

    @torch.inference_mode()
    def logits(comm: Communicator) -> Tensor:
        worker = Worker(config, model, comm)
        batch = make_batch([(tuple(ids), 0, tuple(reversed(range(len(ids)))))], config.block_size, comm.device)
        return worker.model.logits(worker.model.hidden(batch)).cpu()

    with ThreadPoolExecutor(tp) as threads:
        return torch.log_softmax(torch.cat(list(threads.map(logits, loopback(tp, CHOSEN.device))), dim=1), dim=-1)
