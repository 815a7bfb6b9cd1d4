"""The split algebra loses nothing: cuts are even and nest, boxes of all ranks give the tensor back, the leaves of all ranks are
those of the whole, and the coverage proof sees a hole."""

from collections import Counter
from dataclasses import dataclass
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtp.config import ModelConfig, MoeConfig, RopeConfig
from qtp.layout.coverage import boxes, check_covered, multiplicity
from qtp.layout.leaves import LEAVES, leaf_cuts, leaf_experts, leaves_of
from qtp.layout.split import (
    Box,
    Even,
    Expert,
    Grid,
    Heads,
    KVHeads,
    OfGroups,
    OfRows,
    QueryHeads,
    Replicate,
    Split,
    elements,
    even,
    query_head_cuts,
)
from qtp.weights.names import declare


@given(total=st.integers(0, 500), parts=st.integers(1, 20), unit=st.integers(1, 70))
def test_even_partitions_in_whole_units(total: int, parts: int, unit: int) -> None:
    ranges = [even(total, parts, part, unit) for part in range(parts)]
    assert [i for r in ranges for i in r] == list(range(total))
    assert all(r.start % unit == 0 for r in ranges if r)
    units = [-(-len(r) // unit) for r in ranges]
    assert max(units) - min(units) <= 1


def is_cut_among(fine: list[int], coarse: list[int]) -> bool:
    """Whether every (len(fine) - 1) / (len(coarse) - 1)-th cut point of the fine cut is the coarse one's."""
    return fine[:: (len(fine) - 1) // (len(coarse) - 1)] == coarse


@given(total=st.integers(0, 500), parts=st.integers(1, 20), times=st.integers(1, 9), unit=st.integers(1, 70))
def test_even_cuts_are_among_those_of_every_multiple(total: int, parts: int, times: int, unit: int) -> None:
    coarse, fine = ([0, *(even(total, n, part, unit).stop for part in range(n))] for n in (parts, parts * times))
    assert is_cut_among(fine, coarse)


heads_and_parts = st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 12)).map(lambda t: (t[0] * t[1], *t[1:]))


def kv_held(cuts: tuple[int, ...], heads: int, kv_heads: int) -> list[int]:
    """How many KV heads each rank holds: counted, not computed."""
    return [len({query // (heads // kv_heads) for query in range(a, b)}) for a, b in pairwise(cuts)]


@given(heads_and_parts)
def test_query_heads_are_cut_evenly(case: tuple[int, int, int]) -> None:
    heads, kv_heads, parts = case
    cuts = query_head_cuts(heads, kv_heads, parts)
    sizes = [b - a for a, b in pairwise(cuts)]
    assert (cuts[0], cuts[-1], len(sizes)) == (0, heads, parts)
    assert min(sizes) >= 0
    assert max(sizes) - min(sizes) <= 1


@given(heads_and_parts)
def test_twice_as_many_ranks_halve_the_query_heads_of_each(case: tuple[int, int, int]) -> None:
    heads, kv_heads, parts = case
    coarse, fine = (list(query_head_cuts(heads, kv_heads, n)) for n in (parts, 2 * parts))
    assert is_cut_among(fine, coarse)


def fewest_kv_heads(heads: int, kv_heads: int, parts: int) -> int:
    """The KV heads on the fullest rank in the best of all cuts into sizes as even as integers allow: all are tried."""
    small, large = divmod(heads, parts)
    most = []
    for bigger in combinations(range(parts), large):
        cuts = [0]
        for part in range(parts):
            cuts.append(cuts[-1] + small + (part in bigger))
        most.append(max(kv_held(tuple(cuts), heads, kv_heads)))
    return min(most)


@settings(max_examples=150)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 5), st.sampled_from((1, 2, 3, 4, 5, 7, 8, 9))).map(
        lambda t: (t[0] * t[1], *t[1:])
    )
)
def test_no_arrangement_needs_fewer_kv_heads_on_the_fullest_rank(case: tuple[int, int, int]) -> None:
    """Also where the cuts must nest."""
    heads, kv_heads, parts = case
    assert max(kv_held(query_head_cuts(heads, kv_heads, parts), heads, kv_heads)) == fewest_kv_heads(heads, kv_heads, parts)


@pytest.mark.parametrize(
    ("heads", "kv_heads"),
    [(14, 2), (12, 2), (16, 2), (28, 4), (40, 8), (64, 8), (16, 16), (20, 20), (32, 32), (40, 40), (8, 8)]
    + [(heads, kv) for heads in range(1, 33) for kv in range(1, heads + 1) if heads % kv == 0 and 1 < kv < heads],
)
def test_nothing_nested_needs_fewer_kv_heads_than_the_cuts_of_2_4_and_8_ranks(heads: int, kv_heads: int) -> None:
    """Against every chain of halvings: the most at 2 ranks, then at 4, then at 8."""

    def chains(cuts: tuple[int, ...], parts: int) -> list[tuple[int, ...]]:
        most = max(kv_held(cuts, heads, kv_heads))
        if parts == 8:
            return [(most,)]
        ways = product(*(sorted({(a + b) // 2, -(-(a + b) // 2)}) for a, b in pairwise(cuts)))
        finer = [(0, *(c for middle, stop in zip(way, cuts[1:], strict=True) for c in (middle, stop))) for way in ways]
        return [(most, *rest) for fine in finer for rest in chains(fine, 2 * parts)]

    found = tuple(max(kv_held(query_head_cuts(heads, kv_heads, parts), heads, kv_heads)) for parts in (1, 2, 4, 8))
    assert found == min(chains((0, heads), 1))


def test_qwen2_7b_over_8_ranks_holds_one_kv_head_each() -> None:
    heads, grid = Heads(28, 4), Grid.of(8)
    assert [len(heads.query(rank, grid)) for rank in range(8)] == [4, 3, 4, 3, 4, 3, 4, 3]
    assert [list(heads.kv(rank, grid)) for rank in range(8)] == [[0], [0], [1], [1], [2], [2], [3], [3]]


@given(group=st.integers(1, 8), per_rank=st.integers(1, 4), parts=st.integers(1, 8))
def test_where_the_world_divides_the_kv_heads_it_is_the_usual_cut(group: int, per_rank: int, parts: int) -> None:
    kv_heads = per_rank * parts
    heads, grid = Heads(group * kv_heads, kv_heads), Grid.of(parts)
    for rank in range(parts):
        assert heads.kv(rank, grid) == range(rank * per_rank, (rank + 1) * per_rank)
        assert heads.query(rank, grid) == range(rank * per_rank * group, (rank + 1) * per_rank * group)


@given(heads_and_parts)
def test_a_rank_holds_exactly_the_kv_heads_that_its_queries_read(case: tuple[int, int, int]) -> None:
    heads, grid = Heads(case[0], case[1]), Grid.of(case[2])
    for rank in range(case[2]):
        read = {query // (case[0] // case[1]) for query in heads.query(rank, grid)}
        assert set(heads.kv(rank, grid)) == read


@given(
    total=st.integers(0, 200),
    unit=st.integers(1, 30),
    heads=st.tuples(st.integers(1, 8), st.integers(1, 8)).map(lambda t: Heads(t[0] * t[1], t[1])),
    head_dim=st.integers(1, 8),
    size=st.sampled_from((1, 2, 4, 8)),
)
def test_the_leaves_of_all_ranks_are_the_eight_leaves_of_the_whole(
    total: int, unit: int, heads: Heads, head_dim: int, size: int
) -> None:
    whole = Grid.of(1)
    for shape, split in (((3, total), Even(1, unit)), ((heads.heads * head_dim, 2), QueryHeads(0, heads))):
        expected = list(pairwise(leaf_cuts(shape, split, 0, whole)))
        assert len(expected) == LEAVES
        assert (expected[0][0], expected[-1][1]) == (0, shape[split.dim])
        found = []
        for rank in range(size):
            grid = Grid.of(size)
            held = split.box(shape, rank, grid)[split.dim]
            cuts = leaf_cuts(shape, split, rank, grid)
            assert (cuts[0], cuts[-1]) == (0, len(held))
            found += [(held.start + a, held.start + b) for a, b in pairwise(cuts)]
        assert found == expected


@given(experts=st.integers(1, 130), size=st.sampled_from((1, 2, 4, 8)))
def test_the_experts_of_a_ranks_leaves_are_those_that_it_holds(experts: int, size: int) -> None:
    grid = Grid.of(size)
    leaves = [leaf_experts(experts, rank, grid) for rank in range(size)]
    assert [leaf for held in leaves for leaf in held] == list(leaf_experts(experts, 0, Grid.of(1)))
    for rank, held in enumerate(leaves):
        assert len(held) == len(leaves_of(rank, grid)) == LEAVES // size
        boxes_ = [Expert(e, experts, 0).box((4, 4), rank, grid) for e in range(experts)]
        assert [e for leaf in held for e in leaf] == [e for e, box in enumerate(boxes_) if elements(box)]


def test_leaves_of_a_small_dimension_may_be_empty() -> None:
    assert leaf_cuts((2, 5), Even(1), 1, Grid.of(2)) == (0, 1, 1, 2, 3)
    assert leaf_experts(3, 0, Grid.of(4)) == (range(0), range(0))


def test_ranks_that_cannot_share_eight_leaves_are_refused() -> None:
    for size in (3, 5, 6, 7, 9, 16):
        with pytest.raises(ValueError, match=rf"1, 2, 4 or 8 ranks, not {size}; leave --deterministic away"):
            leaf_cuts((4, 4), Even(1), 0, Grid.of(size))
    with pytest.raises(ValueError, match=r"not moe_tp 2"):
        leaf_experts(4, 0, Grid.of(4, moe_tp=2))


@pytest.mark.parametrize(
    ("size", "given_", "expected"),
    [(6, {}, (6, 1)), (6, {"moe_tp": 2}, (3, 2)), (6, {"moe_ep": 2}, (2, 3)), (6, {"moe_ep": 1, "moe_tp": 6}, (1, 6))],
)
def test_grid_fills_in_what_is_left(size: int, given_: dict[str, int], expected: tuple[int, int]) -> None:
    grid = Grid.of(size, **given_)
    assert (grid.moe_ep, grid.moe_tp) == expected


@pytest.mark.parametrize("given_", [{"moe_ep": 4}, {"moe_tp": 4}, {"moe_ep": 2, "moe_tp": 2}, {"moe_ep": 0}, {"moe_tp": -2}])
def test_grid_refuses_what_is_not_the_world_size(given_: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"is not the world size 6"):
        Grid.of(6, **given_)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    kv_heads, group, layers = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    moe = None
    if draw(st.booleans()):
        experts = draw(st.integers(1, 6))
        moe = MoeConfig(
            num_experts=experts,
            top_k=1,
            expert_intermediate_size=draw(st.integers(1, 9)),
            shared_intermediate_size=draw(st.integers(1, 11)),
            norm_topk_prob=False,
            layers=frozenset(draw(st.sets(st.integers(0, layers - 1)))),
        )
    return ModelConfig(
        family="qwen2" if moe is None else "qwen2_moe",
        vocab_size=draw(st.integers(1, 40)),
        hidden_size=draw(st.integers(1, 6)),
        intermediate_size=draw(st.integers(1, 20)),
        num_layers=layers,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 2)),
        max_position=16,
        rms_norm_eps=1e-6,
        tie_word_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        dtype="float32",
        rope=RopeConfig(theta=1e4),
        sliding_window=(None,) * layers,
        moe=moe,
    )


def grids(size: int) -> list[Grid]:
    return [Grid.of(size, moe_ep=ep, moe_tp=size // ep) for ep in range(1, size + 1) if size % ep == 0]


def numbered(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(int(np.prod(shape))).reshape(shape) + 1


def put_together(whole: np.ndarray, held: list[Box]) -> tuple[np.ndarray, np.ndarray]:
    """(a tensor made from the boxes alone, how often each element was given)."""
    out, count = np.zeros_like(whole), np.zeros_like(whole)
    for box in held:
        place = tuple(slice(r.start, r.stop) for r in box)
        if elements(box):
            out[place] = whole[place]
            count[place] += 1
    return out, count


@settings(max_examples=60, deadline=None)
@given(config=configs(), size=st.integers(1, 8))
def test_every_declared_tensor_is_covered_at_any_world_size(config: ModelConfig, size: int) -> None:
    for grid in grids(size):
        for number, spec in enumerate(declare(config)):
            for part in spec.parts:
                check_covered(part.shape, part.split, grid)
                held = boxes(part.shape, part.split, grid)
                whole = numbered(part.shape, number)
                again, count = put_together(whole, held)
                assert np.array_equal(again, whole), (part, grid)
                least, most = multiplicity(part.shape, held)
                assert (least, most) == (count.min(), count.max()), (part, grid)
                if isinstance(part.split, Replicate):
                    assert (least, most) == (size, size)
                elif not isinstance(part.split, KVHeads) or config.num_kv_heads % size == 0:
                    assert (least, most) == (1, 1), (part, grid)


@settings(max_examples=60, deadline=None)
@given(config=configs(), size=st.integers(1, 8))
def test_shapes_of_a_rank_fit_together(config: ModelConfig, size: int) -> None:
    """What one matrix gives is what the next one takes, and the elements of a rank are those of its shapes."""
    for grid in grids(size):
        specs = {spec.name: spec for spec in declare(config)}
        for rank in range(size):
            shapes = {name: spec.shape(rank, grid) for name, spec in specs.items()}
            assert all(int(np.prod(shapes[name])) == spec.elements(rank, grid) for name, spec in specs.items())
            queries, kv = len(config.heads.query(rank, grid)), len(config.heads.kv(rank, grid))
            for layer in range(config.num_layers):
                attention = f"layers.{layer}.attention"
                rows = (queries + 2 * kv) * config.head_dim
                assert shapes[f"{attention}.qkv.weight"] == (rows, config.hidden_size)
                assert shapes.get(f"{attention}.qkv.bias", (rows,)) == (rows,)
                assert shapes[f"{attention}.o.weight"] == (config.hidden_size, queries * config.head_dim)
            for name, shape in shapes.items():
                if name.endswith("gate_up.weight"):
                    down = shapes[name.replace("gate_up", "down")]
                    assert shape[0] == 2 * down[1]
                    assert (shape[1], down[0]) == (config.hidden_size, config.hidden_size) or not shape[0]


def test_each_checkpoint_tensor_is_declared_once() -> None:
    moe = MoeConfig(
        num_experts=3,
        top_k=2,
        expert_intermediate_size=4,
        shared_intermediate_size=6,
        norm_topk_prob=False,
        layers=frozenset({1}),
    )
    config = ModelConfig(
        family="qwen2_moe",
        vocab_size=11,
        hidden_size=4,
        intermediate_size=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        max_position=16,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        qkv_bias=True,
        dtype="float32",
        rope=RopeConfig(theta=1e4),
        sliding_window=(None, None),
        moe=moe,
    )
    names = Counter(part.name for spec in declare(config) for part in spec.parts)
    attention = {f"self_attn.{n}_proj.{w}" for n in "qkv" for w in ("weight", "bias")} | {"self_attn.o_proj.weight"}
    block = attention | {"input_layernorm.weight", "post_attention_layernorm.weight"}
    dense = {f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    inner = [*(f"experts.{e}" for e in range(3)), "shared_expert"]
    sparse = {f"mlp.{i}.{n}_proj.weight" for i in inner for n in ("gate", "up", "down")}
    sparse |= {"mlp.gate.weight", "mlp.shared_expert_gate.weight"}
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    expected |= {f"model.layers.0.{n}" for n in block | dense} | {f"model.layers.1.{n}" for n in block | sparse}
    assert set(names) == expected
    assert set(names.values()) == {1}


def test_what_goes_with_rows_once_is_held_by_the_rank_of_the_first_column() -> None:
    held = boxes((5,), OfRows(Even(1), (5, 9), once=True), Grid.of(4))
    assert [elements(box) for box in held] == [5, 0, 0, 0]
    assert multiplicity((5,), held) == (1, 1)
    held = boxes((5,), OfRows(Even(1), (5, 2), once=True), Grid.of(4))  # two columns: the first rank has none of them
    assert [elements(box) for box in held] == [0, 5, 0, 0]
    assert boxes((5, 1), OfRows(Even(0), (5, 9), once=True), Grid.of(2)) == [(range(2), range(1)), (range(2, 5), range(1))]


def test_a_group_that_is_cut_is_held_by_both() -> None:
    held = boxes((3, 5), OfGroups(Even(1), (3, 18), 4), Grid.of(3))  # 18 columns: 6 a rank, groups of 4 and one of 2
    assert [box[1] for box in held] == [range(2), range(1, 3), range(3, 5)]
    assert multiplicity((3, 5), held) == (1, 2)


@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    edges=st.lists(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=3), max_size=4),
)
def test_multiplicity_counts_what_a_brute_force_count_finds(shape: tuple[int, ...], edges: list[list[tuple[int, int]]]) -> None:
    held = [
        tuple(range(min(a, n), max(min(a, n), min(b, n))) for (a, b), n in zip(pairs, shape, strict=False)) for pairs in edges
    ]
    _, count = put_together(numbered(shape, 1), held)
    assert multiplicity(shape, held) == (count.min(), count.max())


@dataclass(frozen=True)
class _Broken:
    """An even cut along 0 that one rank gets wrong: it starts late, ends early, or reaches beyond the tensor."""

    late: int = 0
    early: int = 0

    def box(self, shape: tuple[int, ...], rank: int, grid: Grid) -> Box:
        rows = even(shape[0], grid.size, rank)
        if rank == 1:
            rows = range(rows.start + self.late, rows.stop - self.early)
        return (rows, *(range(n) for n in shape[1:]))


@dataclass(frozen=True)
class _LosesACorner:
    """Rank 1's box misses just the last element of its last row."""

    def box(self, shape: tuple[int, ...], rank: int, grid: Grid) -> Box:
        return (range(rank, rank + 1), range(shape[1] - (rank == 1)))


@dataclass(frozen=True)
class _TooFewDimensions:
    def box(self, shape: tuple[int, ...], rank: int, grid: Grid) -> Box:
        return (range(shape[0]),)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (_Broken(late=1), "held by no rank"),
        (_Broken(early=1), "held by no rank"),
        (_Broken(early=-9), "leaves the tensor"),
        (_Broken(late=-9), "leaves the tensor"),
        (_TooFewDimensions(), "leaves the tensor"),
    ],
)
def test_a_broken_split_is_seen(split: Split, message: str) -> None:
    check_covered((9, 4), _Broken(), Grid.of(3))
    with pytest.raises(ValueError, match=message):
        check_covered((9, 4), split, Grid.of(3))


def test_a_single_lost_element_is_seen() -> None:
    check_covered((3, 4), Even(0), Grid.of(3))
    with pytest.raises(ValueError, match=r"\(3, 4\).*held by no rank"):
        check_covered((3, 4), _LosesACorner(), Grid.of(3))


def test_an_expert_that_no_group_holds_is_seen() -> None:
    check_covered((4, 4), Expert(2, 3, 0), Grid.of(2))
    with pytest.raises(ValueError, match="held by no rank"):
        check_covered((4, 4), Expert(3, 3, 0), Grid.of(2))


def test_query_heads_scale_to_elements() -> None:
    grid = Grid.of(3)
    assert [QueryHeads(1, Heads(4, 2)).box((5, 12), rank, grid)[1] for rank in range(3)] == [range(6), range(6, 9), range(9, 12)]
    assert [KVHeads(0, Heads(4, 2)).box((6, 5), rank, grid) for rank in range(3)] == [
        (range(3), range(5)),
        (range(3, 6), range(5)),
        (range(3, 6), range(5)),
    ]
