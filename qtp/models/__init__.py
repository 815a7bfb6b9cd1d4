"""One readable file a model family."""

from qtp.models.qwen2 import Place, Qwen2ForCausalLM
from qtp.models.qwen2_moe import Qwen2MoeForCausalLM

FAMILIES = {"qwen2": Qwen2ForCausalLM, "qwen2_moe": Qwen2MoeForCausalLM}

__all__ = ["FAMILIES", "Place", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM"]
