"""The scales of an int8 KV cache, from a checkpoint's tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from qtp.config import ModelConfig
from qtp.kv.cache import KVScales
from qtp.quantization import FAQUANT


def kv_scales(config: ModelConfig, tensors: Mapping[str, Tensor]) -> KVScales | None:
    """Those of this rank's heads from its loaded `tensors`; None for a cache in float. Raises ValueError for values that cannot
    be."""
    if config.quantization is None or config.quantization.kv_cache is None:
        return None
    heads_only, source = config.quantization.kv_cache == FAQUANT, config.quantization.source

    def of(name: str) -> Tensor:
        layers = []
        for i in range(config.num_layers):
            values = tensors[f"layers.{i}.attention.{name}"]
            fine = values.isfinite() & (values > 0) if name.endswith("scale") else values.abs() <= 128
            if not bool(fine.all()):
                raise ValueError(
                    f"{source}: layer {i} has a {name.replace('_', ' ')} of its KV cache that cannot be (a scale is a number "
                    "above 0, an offset one from -128 to 127); quantize the checkpoint again"
                )
            layers.append(values)
        return torch.stack(layers)

    alike = [] if heads_only else [i for i, x in enumerate(of("key_scale")) if len(x) > 1 and bool((x == x[0]).all())]
    if alike:
        raise ValueError(
            f"{source}: the keys of layer {alike[0]} have one scale for all channels of the KV cache; keys of this family have "
            "channels a hundred times as large as others, quantize the checkpoint again with a scale for each channel"
        )

    def channels(name: str) -> Tensor:
        x = of(name)
        return x.expand(*x.shape[:2], config.head_dim).contiguous() if heads_only else x.unflatten(1, (-1, config.head_dim))

    return KVScales(
        key_scale=channels("key_scale"),
        key_offset=channels("key_offset"),
        value_scale=channels("value_scale"),
        value_offset=channels("value_offset"),
        query_scale=of("query_scale")[..., 0] if heads_only else None,
        query_offset=of("query_offset")[..., 0] if heads_only else None,
    )
