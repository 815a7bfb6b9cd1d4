"""quantization_config as llm-compressor writes it for its scheme FP8_DYNAMIC, with one group of layers."""

from typing import Any

GROUP: dict[str, Any] = {
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, "symmetric": True, "observer": "minmax"},
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True},
    "output_activations": None,
    "targets": ["Linear"],
}
FP8_DYNAMIC: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": GROUP},
    "ignore": ["lm_head", "re:.*mlp.gate$"],
    "kv_cache_scheme": None,
    "sparsity_config": {},
}
