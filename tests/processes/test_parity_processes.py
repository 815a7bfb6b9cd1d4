"""Proves over real processes, shared memory and gloo what tests/loopback proves over threads: transformers' numbers, with heads,
columns, vocabulary and experts that the world size does not divide. With --device cuda two processes share a card."""

from collections.abc import Callable
from typing import Any

import pytest
from device_helper import CHOSEN, between_processes
from models_helper import Reference, check, make_checkpoint, open_llm, random_ids, refer

DENSE: dict[str, Any] = {
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "hidden_size": 56,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "vocab_size": 131,
    "tie_word_embeddings": True,
}
MOE: dict[str, Any] = {
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "hidden_size": 50,
    "head_dim": 8,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "vocab_size": 127,
    "num_experts": 13,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 19,
    "shared_expert_intermediate_size": 29,
    "norm_topk_prob": True,
}
CASES = {"qwen2": (DENSE, 3), "qwen2_moe": (MOE, 3)}

Refer = Callable[[str], Reference]


@pytest.fixture(scope="module")
def refer_to(tmp_path_factory: pytest.TempPathFactory) -> Refer:
    """The Reference of a family; made once."""
    made: dict[str, Reference] = {}

    def get(family: str) -> Reference:
        if family not in made:
            config, seed = CASES[family]
            folder = make_checkpoint(tmp_path_factory.mktemp(family), family, seed=seed, **config)
            made[family] = refer(folder, random_ids(26, config["vocab_size"], seed), 64, distinct=16)
        return made[family]

    return get


RUNS = {
    "cpu": [("auto", 2), ("auto", 3), ("auto", 4), ("gloo", 2), ("gloo", 3)],
    "cuda": [("auto", 2), ("gloo", 2), ("cuda_ipc", 2)],
}


@pytest.mark.parametrize(("communicator", "tp"), RUNS[CHOSEN.name])
@pytest.mark.parametrize("family", CASES)
def test_processes_give_the_numbers_of_transformers(family: str, communicator: str, tp: int, refer_to: Refer) -> None:
    with open_llm(refer_to(family).folder, tp, communicator=communicator) as llm:
        assert llm.config.communicator == {"auto": between_processes(tp)}.get(communicator, communicator)
        assert len(llm.ranks.ready) == tp
        assert (llm.ranks.worker.graphs is not None) == (llm.config.communicator in ("nccl", "cuda_ipc"))
        check(llm, refer_to(family))
