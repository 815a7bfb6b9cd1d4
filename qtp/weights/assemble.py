"""From the loaded tensors of a quantized checkpoint to what the model files take. Imports no torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qtp.config import ModelConfig
from qtp.layout.split import Grid
from qtp.quantization import FLOAT
from qtp.weights.formats import FORMATS, Linear
from qtp.weights.names import quantized_layers
from qtp.weights.quantized import Float, Packed, Quantized

if TYPE_CHECKING:
    from torch import Tensor

Shard = Mapping[str, Any]  # a Tensor, or of a linear layer a Quantized or Packed weight


def assemble(config: ModelConfig, tensors: "Mapping[str, Tensor]", rank: int, grid: Grid) -> "Shard":
    """`tensors`, in which each quantized layer has become one weight, under the name that it would have as a float one.
    ValueError naming a tensor whose values cannot be."""
    shard: dict[str, Any] = dict(tensors)
    for name, parts in quantized_layers(config):
        weights: list[Quantized | Float] = []
        for part in parts:
            for spec in FORMATS[part.kind].specs(part):
                shard.pop(spec.name, None)
            if held(part, rank, grid):
                weights += FORMATS[part.kind].assemble(part, tensors, rank, grid)
        if not weights:  # an expert of other ranks
            shard[name] = tensors[f"{parts[0].own}.weight"]
            continue
        first = weights[0]
        shard[name] = first if len(weights) == 1 and not isinstance(first, Float) else Packed(tuple(weights))
    return shard


def held(part: Linear, rank: int, grid: Grid) -> bool:
    """Whether `rank` has anything to do with it: all but the experts of other ranks."""
    return any(part.parts[0].split.box(part.parts[0].shape, rank, grid))


def check_quantization(config: ModelConfig, grid: Grid) -> None:
    """Raises ValueError for what the description asks and no rank could compute."""
    quantization, moe = config.quantization, config.moe
    if quantization is None or moe is None:
        return
    for layer in moe.layers:
        experts = [f"model.layers.{layer}.mlp.experts.{e}" for e in range(moe.num_experts)]
        names = [
            f"{mlp}.{n}_proj.weight"
            for mlp in (*experts, f"model.layers.{layer}.mlp.shared_expert")
            for n in ("gate", "up", "down")
        ]
        kinds = {quantization.type_of(name) for name in names}
        if grid.moe_tp > 1 and (by_token := kinds & {"W8A8_DYNAMIC", "W8A8_FP8"}):
            raise ValueError(
                f"moe_tp {grid.moe_tp} cuts the columns of an expert, and {min(by_token)} takes the largest of all of them for "
                "each token; leave moe_tp and moe_ep away, so that experts stay whole"
            )
        anti = f"model.layers.{layer}.post_attention_layernorm.module.weight" in quantization.types
        inputs = {quantization.type_of(name) for name in names if "down_proj" not in name}
        if anti and FLOAT in inputs and len(inputs) > 1:
            raise ValueError(
                f"{quantization.source}: layer {layer} has an anti-outlier norm, and of its experts some are float and some are "
                "not; quantize it again with all of them in one form"
            )
