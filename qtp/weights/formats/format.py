"""What a format is, and what it is given. Imports no torch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import TYPE_CHECKING

from qtp.layout.spec import RUN, Part, Spec
from qtp.layout.split import Grid, OfRows, Split
from qtp.weights.quantized import Float, Quantized

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """Parts of a linear layer of the running model that are in one format, and follow each other in its outputs.

    own: the prefix of its tensors' names in the running model; parts: the weights, [n, k] each, under their checkpoint names;
    biased: whether the float model has a bias. group_size as in `Quantization`."""

    own: str
    kind: str
    parts: tuple[Part, ...]
    biased: bool
    group_size: int

    def spec(self, suffix: str, dtype: str, shape: Callable[[Part], tuple[int, ...]], split: Callable[[Part], Split]) -> Spec:
        """The tensor `suffix` beside each part's weight, of these shapes and splits."""
        parts = tuple(Part(sibling(part, suffix), shape(part), split(part)) for part in self.parts)
        return Spec(f"{self.own}.{suffix}", parts, dtype)

    def weight(self, dtype: str) -> Spec:
        return Spec(f"{self.own}.weight", self.parts, dtype)

    def outputs(self, suffix: str, dtype: str, *rest: int, once: bool = False) -> Spec:
        """One value, or `rest` values, for each output. once: see `OfRows`."""
        return self.spec(suffix, dtype, lambda p: (p.shape[0], *rest), lambda p: OfRows(p.split, matrix(p), once))

    def bias(self) -> Iterator[Spec]:
        """The float bias, if the layer has one."""
        if self.biased:
            yield self.outputs("bias", RUN, once=True)

    def rows(self, rank: int, grid: Grid) -> list[range]:
        """Where the outputs of each part lie in what `rank` holds."""
        ends = [0]
        for part in self.parts:
            ends.append(ends[-1] + len(part.split.box(part.shape, rank, grid)[0]))
        return [range(a, b) for a, b in pairwise(ends)]


class Format(ABC):
    """How a linear layer lies in a checkpoint."""

    def granularity(self, group_size: int) -> int:
        """How many input columns of a layer stay together where it is cut. group_size: as in `Quantization`."""
        return 1

    @abstractmethod
    def specs(self, linear: Linear) -> Sequence[Spec]:
        """Its tensors; the names begin with `linear.own`."""

    @abstractmethod
    def assemble(self, linear: Linear, tensors: Tensors, rank: int, grid: Grid) -> Sequence[Quantized | Float]:
        """From the loaded tensors by `Spec.name`, what `rank` computes with: one weight, or several whose outputs follow each
        other if the parts cannot be one. Raises ValueError naming a tensor whose values cannot be."""


def matrix(part: Part) -> tuple[int, int]:
    n, k = part.shape
    return n, k


def sibling(part: Part, suffix: str) -> str:
    """The checkpoint's name of a tensor beside a weight."""
    return f"{part.name.removesuffix('.weight')}.{suffix}"


def check_scales(linear: Linear, suffix: str, values: "Tensor") -> None:
    """Raises ValueError if one is not a finite number above 0."""
    if not bool(((values > 0) & values.isfinite()).all()):
        raise ValueError(
            f"{_among(linear, suffix)}: a scale that is zero, negative or not a number; quantize the checkpoint again"
        )


def check_offsets(linear: Linear, suffix: str, values: "Tensor") -> None:
    """Raises ValueError if one is not a finite number within int8, where offsets lie."""
    if not bool((values.abs() <= 128).all()):
        raise ValueError(
            f"{_among(linear, suffix)}: an offset that is not a number from -128 to 127; quantize the checkpoint again"
        )


def number(linear: Linear, suffix: str, value: float) -> float:
    if not isfinite(value):
        raise ValueError(f"{_among(linear, suffix)}: is not a finite number; quantize the checkpoint again")
    return value


def _among(linear: Linear, suffix: str) -> str:
    names = [sibling(part, suffix) for part in linear.parts]
    return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1].split('.')[-2]}.{suffix}"
