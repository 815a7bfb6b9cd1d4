"""What a set of kernels offers. T tokens, D the width of the input, N that of the output."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, overload, runtime_checkable

from torch import Tensor

from collectives.communicator import Communicator
from qtp.weights.quantized import Unscaled, Weight

Op = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Deferred:
    """The whole sum over the ranks, not made yet: add_to(x [T, D], contiguous) adds it to x in the call that makes it, and
    returns x."""

    add_to: Op


Partial = Tensor | Unscaled | Deferred  # a rank's part of a sum over ranks
RowOp = Callable[[Tensor], Partial]
Reduce = Callable[[Tensor | Unscaled], Tensor]
Whole = Callable[[Tensor, object], Deferred | None]  # with the attention backend's plan; None: not for so many tokens
Experts = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Choose = Callable[[Tensor], tuple[Tensor, Tensor]]
Cuts = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Norm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467). The division is done in float32 and rounded
    before the weight is applied, as in transformers. weight [D]. bias [D]: is added in float32, before the product with the
    weight is rounded.

    anti: the norm that quantized weights take in its place (msModelSlim's anti-outlier norm, for which they were made); float
    weights, and the float parts of packed ones, keep this one."""

    weight: Tensor
    eps: float
    bias: Tensor | None = None
    anti: "Norm | None" = None


@dataclass(frozen=True, slots=True)
class Expert:
    """The weights of one expert: gate_up [2 F, D], the gate first; down [D, F]."""

    gate_up: Weight
    down: Weight


class Head(Protocol):
    """The last linear layer, over this rank's V rows of the vocabulary."""

    def logits(self, x: Tensor) -> Tensor:
        """x W^T, [T, V] float32."""
        ...

    def best(self, x: Tensor, count: int, allowed: int) -> tuple[Tensor, Tensor]:
        """The `count` largest of the first `allowed` columns of the logits, values [T, count] float32 and columns [T, count]
        int64, the largest first and the lower column first among equals. count <= allowed <= V."""
        ...


@runtime_checkable
class Joins(Protocol):
    """An op that can do a whole half of a block in one call, which saves what Python takes for a step of few tokens."""

    def joined(self, second: RowOp, comm: Communicator) -> Whole | None:
        """reduce(second(self(x))), the sum being over `comm`; None where these two cannot go together."""
        ...


class Kernels(Protocol):
    """Each method prepares a kernel for weights that stay as they are, and returns what is called in every step.

    With a norm, an op takes norm(x) in place of x.

    A weight is row-major, its rows may lie apart (a stride). Outputs have the dtype of the input unless it is said otherwise.
    A quantized one holds its bias itself, and its classes (`weights.quantized`) say what y is.

    `cuts` (see `layout.leaves`) asks for sums that do not depend on the world size: offsets 0 ... D that cut the D products of
    an output into leaves, each of which is added up by itself, in float32.
    """

    @property
    def name(self) -> str:
        """What is shown at start."""
        ...

    @property
    def waits(self) -> bool:
        """Whether an op that was prepared waits for the device, so that no CUDA graph can hold it."""
        ...

    @overload
    def linear(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        norm: Norm | None = None,
        cuts: Cuts | None = None,
    ) -> Op: ...

    @overload
    def linear(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        norm: Norm | None = None,
        cuts: Cuts | None = None,
        across: Communicator | None,
    ) -> RowOp: ...

    def linear(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        norm: Norm | None = None,
        cuts: Cuts | None = None,
        across: Communicator | None = None,
    ) -> RowOp:
        """y = x W^T + b with this rank's box of W: [T, D] to [T, N]. weight [N, D]; bias [N].

        Cut on its rows (a column linear, in Megatron's word), it takes the full input and gives this rank's columns of the
        output. Cut on its columns (a row linear), it takes this rank's part of the input and gives a PARTIAL sum of the full
        output, to be reduced by the block; its bias, if any, is held by one rank only (`layout.split.OfRows`). With cuts, which
        go without a bias, y is float32: the leaves added along a binary tree (`collectives.tree`).

        across: for a row linear, the ranks that hold the other columns; each must call the op in every step. W8A8 and
        W8A8Dynamic then give an `Unscaled`, whatever cuts say, of the same bits at every world size; W8A8FP8 takes the largest
        value of a token over them, and gives floats; others ignore it."""
        ...

    def joining(self, weight: Weight) -> RowOp:
        """As `linear`, for a row linear of a lone rank whose output joins the residual stream; may give a `Deferred`."""
        ...

    def linear_leaves(self, weight: Weight, cuts: Cuts, across: Communicator | None = None) -> Op:
        """As `linear`, with the leaves not yet added: [T, D] to [leaves, T, N] float32. Of integers the sum of each leaf is
        scaled; the leaf of the first column has quant_bias."""
        ...

    def gated(self, weight: Weight, *, norm: Norm | None = None) -> Op:
        """silu(gate(x)) * up(x) (arXiv 2002.05202): [T, D] to [T, F]. weight [2 F, D]: gate, then up."""
        ...

    def rms_norm(self, norm: Norm) -> Op:
        """norm(x): [T, D] to [T, D]."""
        ...

    def choose(self, top_k: int, norm_topk_prob: bool) -> Choose:
        """From a router's logits [T, E] to the weights and the indices (int64) of the chosen experts, [T, K] each: the K = top_k
        largest of their softmax, which is done in float32, divided by their sum if norm_topk_prob."""
        ...

    def scale(self, gate: Tensor, x: Tensor) -> Tensor:
        """sigmoid(gate) * x, in the dtype of x and perhaps in its place. gate: [T, 1]; x: [T, D] or [leaves, T, D]."""
        ...

    def head(self, weight: Weight) -> Head:
        """weight [V, D]."""
        ...

    def experts(self, experts: Mapping[int, Expert], leaves: Sequence[range] | None = None) -> Experts:
        """Called with (x [T, D], weights [T, K], chosen [T, K] int64, partial [T, D]): adds the sum over k of
        weights[t, k] * down(gated(x[t])) of expert chosen[t, k] to partial[t], and returns it. Experts that are not in
        `experts` are left out: other ranks hold them.

        leaves: the experts of each leaf. partial is then [leaves, T, D] float32; the sum of each leaf's experts, in their order,
        is added to its part, and what is returned is [T, D] float32, the leaves added along a binary tree."""
        ...


def in_floats(op: RowOp) -> Op:
    """`op`, with a sum that is in integers still scaled on this rank: where it is added to others before the ranks' are."""

    def run(x: Tensor) -> Tensor:
        partial = op(x)
        assert not isinstance(partial, Deferred)
        return partial.scaled(partial.total) if isinstance(partial, Unscaled) else partial

    return run
