"""Tiny random float32 checkpoints with a tokenizer, and ways to drive an LLM step by step with every worker in reach."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest
import torch
from device_helper import CHOSEN
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from collectives.loopback import Loopback, loopback
from qtp import LLM, RequestOutput, SamplingParams
from qtp.llm import prepare
from qtp.worker.worker import Worker

VOCAB = 101
TEXT_VOCAB = 97
EOS = 95
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}a {% endif %}"
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": EOS,
    "bos_token_id": 96,
    "tie_word_embeddings": False,
}
_SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
_MOE = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 14,
    "shared_expert_intermediate_size": 22,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_FOLDERS: list[TemporaryDirectory[str]] = []

T = TypeVar("T")
Job = tuple[list[int], SamplingParams]


@cache
def oracle(kind: str) -> Any:
    """The transformers model of `kind`: "dense", "sliding" (a window of 5 in the last layer) or "moe". All weights random, none
    zero, spread so that the logits are far from flat."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

    generator = torch.Generator().manual_seed({"dense": 11, "sliding": 12, "moe": 13}[kind])
    if kind == "moe":
        model: Any = Qwen2MoeForCausalLM(Qwen2MoeConfig(**_SHAPE, **_MOE))
        model.set_experts_implementation("eager")
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**_SHAPE, **(_SLIDING if kind == "sliding" else {})))
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.data = 1.0 + 0.2 * noise
        elif name.endswith("bias") or name.startswith("lm_head"):
            parameter.data = 0.4 * noise
        else:
            scale = 0.2 if "embed_tokens" in name else 1.6 * parameter.shape[-1] ** -0.5
            parameter.data = scale * noise
    return model.to(torch.float32).eval()


@cache
def checkpoint(kind: str) -> Path:
    """A folder with the weights of `oracle(kind)` and a byte-level tokenizer of TEXT_VOCAB tokens, some of them parts of a
    character. Gone when the process ends."""
    _FOLDERS.append(TemporaryDirectory(prefix=f"qtp-{kind}-"))
    folder = Path(_FOLDERS[-1].name)
    oracle(kind).save_pretrained(folder)
    texts = [*"abcdefghijklmnopqrstuvwxyz0123456789", "Ġ", "Ã", "©", "â", "Ĥ", "¬"]
    texts += [a + b for a in "abcdef" for b in "uvwxyzabc"][: EOS - len(texts)]
    backend = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>", "<|start|>"])
    assert backend.token_to_id("<|end|>") == EOS
    assert backend.get_vocab_size() == TEXT_VOCAB
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@torch.inference_mode()
def oracle_logits(kind: str, ids: Sequence[int]) -> Tensor:
    """[len(ids), VOCAB] of transformers."""
    logits: Tensor = oracle(kind)(torch.tensor([list(ids)])).logits[0]
    return logits


class SeenWorkers:
    """Workers made while this is patched in, by rank of their making; `poison` overwrites their fresh KV caches with NaN."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, poison: bool = False) -> None:
        self.workers: list[Worker] = []
        seen = self.workers

        class Seen(Worker):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                if poison:
                    self.cache.keys.fill_(float("nan"))
                    self.cache.values.fill_(float("nan"))
                seen.append(self)

        monkeypatch.setattr("qtp.worker.ranks.Worker", Seen)
        monkeypatch.setattr("qtp.worker.follow.Worker", Seen)

    def forgot(self) -> bool:
        """Whether every worker knows no sequence any more. To be asked while the ranks live: those above 0 run behind rank 0,
        so they get a while to catch up."""
        for _ in range(1000):
            if not any(worker.sequences for worker in self.workers):
                return True
            time.sleep(0.01)
        return False


def make(kind: str, tp: int = 1, **choices: Any) -> LLM:
    """An LLM on `tp` threads of the chosen device, ids only unless load_tokenizer is given."""
    settings = {"communicator": "loopback", "load_tokenizer": False, "dtype": "float32", "timeout": 60.0, "device": CHOSEN.name}
    choices = settings | choices
    return LLM(str(checkpoint(kind)), tp=tp, **choices)


def random_jobs(random: Random, count: int, longest_prompt: int, longest_output: int, **params: Any) -> list[Job]:
    """Requests of random prompts and lengths; they never end early."""
    jobs = []
    for _ in range(count):
        prompt = [random.randrange(VOCAB) for _ in range(random.randint(1, longest_prompt))]
        settings = {"temperature": 0.0, "ignore_eos": True, "max_tokens": random.randint(1, longest_output), **params}
        jobs.append((prompt, SamplingParams(**settings)))
    return jobs


def blocks_for(jobs: Sequence[Job], block_size: int) -> int:
    """The fewest KV blocks with which every job can be served alone."""
    return max(-(-(len(ids) + (params.max_tokens or 0) - 1) // block_size) for ids, params in jobs)


def serve(llm: LLM, jobs: Sequence[Job], random: Random | None = None) -> list[RequestOutput]:
    """The finished outputs of `jobs` in order, which arrive between steps at random (None: all at once)."""
    order, left = [], list(jobs)
    done: dict[int, RequestOutput] = {}
    while left or llm.engine.has_work:
        arriving = len(left) if random is None else random.choice((0, 0, 1, 1, 2, 5))
        for ids, params in left[:arriving]:
            order.append(llm.engine.add(ids, params))
        left = left[arriving:]
        for output in llm.engine.step():
            assert output.request_id not in done
            if output.finished:
                done[output.request_id] = output
    return [done[i] for i in order]


def idle(llm: LLM) -> bool:
    """Nothing runs or waits, every block is free and rank 0's worker knows no sequence."""
    scheduler = llm.engine.scheduler
    free = scheduler.pool.num_free == scheduler.pool.num_blocks
    return free and not scheduler.running and not scheduler.waiting and not llm.engine.has_work and not llm.ranks.worker.sequences


def on_threads(size: int, body: Callable[[Loopback], T], device: torch.device | None = None) -> list[T]:
    """Runs `body` on every rank of a loopback communicator of `device` (None: the chosen one) and returns the results by rank;
    raises the first error."""
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(comm: Loopback) -> None:
        try:
            results[comm.rank] = body(comm)
        except BaseException as error:
            errors.append(error)
            comm.close()

    threads = [threading.Thread(target=run, args=(comm,)) for comm in loopback(size, device or CHOSEN.device)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]


def settled(kind: str, tp: int, **choices: Any) -> Any:
    """(EngineConfig, ModelConfig) as every rank of a loopback run gets them."""
    from qtp.config import EngineConfig

    config = {"communicator": "loopback", "dtype": "float32", "device": CHOSEN.name, **choices}
    return prepare(EngineConfig(model=str(checkpoint(kind)), tp=tp, **config))
