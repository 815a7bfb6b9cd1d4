"""Which boxes of a checkpoint go to which places of which files: the copy list of a reshard, and the proof that it is whole.

The tensors that the model declares are cut as it declares. What a checkpoint holds beyond them stays whole in the first file.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

from qtp.layout.coverage import multiplicity
from qtp.layout.spec import Spec
from qtp.layout.split import Box, Grid, elements
from qtp.weights.checkpoint import Checkpoint
from qtp.weights.mindformers import to_mindformers
from qtp.weights.store import FLOATS, ITEM_SIZE, encoded_header

DIGEST_WIDTH = 32  # hex digits that mark the files of one reshard, in their headers


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A tensor as it is to be written: `sources` are its tensors of the checkpoint, more than one if they are stacked along a new
    first dimension. held: for each rank that has some of it, (rank, box of it, box of each source)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    held: tuple[tuple[int, Box, tuple[Box, ...]], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """Where a box of a target goes: `size` bytes from `offset` on of a file. taken: the box of each source, which follow one
    another there, and each of which may be empty."""

    file: int
    offset: int
    size: int
    box: Box
    taken: tuple[Box, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """All that is written of one target; what is done is remembered by job."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    slots: tuple[Slot, ...]

    @property
    def bytes(self) -> int:
        return sum(slot.size for slot in self.slots)


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """A file to be written: its path in the folder, bytes in all, and its header around a digest of DIGEST_WIDTH places; None:
    without one."""

    path: str
    size: int
    header: tuple[bytes, bytes] | None
    plain: bytes


def targets(source: Checkpoint, specs: Sequence[Spec], grid: Grid, names: str, dtype: str | None) -> list[Target]:
    """Every tensor of the checkpoint, cut for `grid`. names: "hf" or "mindformers"; dtype: what declared floats become. Raises
    ValueError if a declared tensor is missing or of another shape, or if experts that are to be stacked differ."""
    found: list[Target] = []
    stacks: dict[str, list[Target]] = {}
    for part in (part for spec in specs for part in spec.parts):
        entry = source.check(part.name, part.shape)
        boxes = [part.split.box(part.shape, rank, grid) for rank in range(grid.size)]
        name, expert = to_mindformers(part.name) if names == "mindformers" else (part.name, None)
        target = Target(
            name=name,
            dtype=dtype if dtype and entry.dtype in FLOATS else entry.dtype,
            shape=part.shape,
            sources=(part.name,),
            held=tuple((rank, box, (box,)) for rank, box in enumerate(boxes) if elements(box)),
        )
        if expert is None:
            found.append(target)
        else:
            stacks.setdefault(name, []).append(target)
            assert len(stacks[name]) == expert + 1, "experts are declared in order"
    found += [_stacked(experts, grid) for experts in stacks.values()]
    return found + [_kept(source, name) for name in undeclared(source, specs)]


def undeclared(source: Checkpoint, specs: Sequence[Spec]) -> list[str]:
    """The tensors that a model does not declare, such as buffers of older releases; they stay whole, in the first file."""
    return sorted(source.entries.keys() - {part.name for spec in specs for part in spec.parts})


def _kept(source: Checkpoint, name: str) -> Target:
    entry = source.entries[name]
    box = tuple(range(n) for n in entry.shape)
    return Target(name=name, dtype=entry.dtype, shape=entry.shape, sources=(name,), held=((0, box, (box,)),))


def _stacked(experts: list[Target], grid: Grid) -> Target:
    first = experts[0]
    for other in experts:
        if (other.dtype, other.shape) != (first.dtype, first.shape):
            raise ValueError(
                f"tensors {first.sources[0]} ({first.dtype}) and {other.sources[0]} ({other.dtype}) cannot be stacked; "
                "use --names hf"
            )
    held = []
    for rank in range(grid.size):
        boxes = [next((box for r, box, _ in expert.held if r == rank), None) for expert in experts]
        own = [e for e, box in enumerate(boxes) if box is not None]
        if own:
            box = boxes[own[0]]
            assert box is not None
            assert all(b == (box if own[0] <= e <= own[-1] else None) for e, b in enumerate(boxes)), (
                "a rank's experts are a range"
            )
            nothing = tuple(range(0) for _ in box)
            taken = tuple(b if b is not None else nothing for b in boxes)
            held.append((rank, (range(own[0], own[-1] + 1), *box), taken))
    return Target(
        name=first.name,
        dtype=first.dtype,
        shape=(len(experts), *first.shape),
        sources=tuple(source for expert in experts for source in expert.sources),
        held=tuple(held),
    )


def in_parts(found: Sequence[Target], size: int, stem: str) -> tuple[list[Output], list[Job]]:
    """One file a rank."""
    paths = [f"part{rank}-of-{size}/{stem}.safetensors" for rank in range(size)]
    return _laid_out(found, paths, {(t.name, rank): rank for t in found for rank, _, _ in t.held}, marked=True)


def in_files(found: Sequence[Target], most: int, stem: str) -> tuple[list[Output], list[Job], dict[str, str]]:
    """Whole tensors in files of at most `most` bytes, where one tensor is not more; and which file has which tensor."""
    sizes = [prod(t.shape) * ITEM_SIZE[t.dtype] for t in found]
    number, filled, places = 0, 0, {}
    for target, size in zip(found, sizes, strict=True):
        if filled and filled + size > most:
            number, filled = number + 1, 0
        filled += size
        places[target.name, 0] = number
    count = number + 1
    paths = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [f"{stem}.safetensors"]
    outputs, jobs = _laid_out(found, paths, places, marked=False)
    return outputs, jobs, {name: paths[i] for (name, _), i in places.items()}


def _laid_out(
    found: Sequence[Target], paths: Sequence[str], places: dict[tuple[str, int], int], *, marked: bool
) -> tuple[list[Output], list[Job]]:
    """places: the file of (target, rank). Within a file wide dtypes come first, so that each tensor is aligned to its own."""
    contents: list[list[tuple[Target, int, Box]]] = [[] for _ in paths]
    for target in found:
        for rank, box, _ in target.held:
            contents[places[target.name, rank]].append((target, rank, box))
    outputs, offsets = [], {}
    for number, (path, content) in enumerate(zip(paths, contents, strict=True)):
        fields, at, starts = {}, 0, {}
        for target, rank, box in sorted(content, key=lambda held: -ITEM_SIZE[held[0].dtype]):
            stop = at + elements(box) * ITEM_SIZE[target.dtype]
            fields[target.name] = {"dtype": target.dtype, "shape": [len(r) for r in box], "data_offsets": [at, stop]}
            starts[target.name, rank], at = at, stop
        mark = "0" * DIGEST_WIDTH
        metadata = {"format": "pt", **({"qtp_part": path.partition("/")[0], "qtp_cut": mark} if marked else {})}
        plain = encoded_header(metadata, fields)
        before, _, after = plain.partition(mark.encode())
        outputs.append(Output(path=path, size=len(plain) + at, header=(before, after) if marked else None, plain=plain))
        offsets.update({held: (number, len(plain) + start) for held, start in starts.items()})
    jobs = [
        Job(
            name=t.name,
            dtype=t.dtype,
            shape=t.shape,
            sources=t.sources,
            slots=tuple(
                Slot(
                    file=offsets[t.name, rank][0],
                    offset=offsets[t.name, rank][1],
                    size=elements(box) * ITEM_SIZE[t.dtype],
                    box=box,
                    taken=taken,
                )
                for rank, box, taken in t.held
            ),
        )
        for t in found
    ]
    prove(outputs, jobs)
    return outputs, jobs


def prove(outputs: Sequence[Output], jobs: Iterable[Job]) -> None:
    """Raises ValueError unless every element of every tensor goes somewhere, what is taken is what is written, and the places
    fill the data of each file with neither a gap nor an overlap."""
    filled: list[list[tuple[int, int]]] = [[(0, len(output.plain))] for output in outputs]
    for job in jobs:
        if not _covers(job.shape, tuple(slot.box for slot in job.slots)):
            raise ValueError(f"some elements of tensor {job.name} would go nowhere; this is a fault of qtp")
        for slot in job.slots:
            if sum(map(elements, slot.taken)) * ITEM_SIZE[job.dtype] != slot.size:
                raise ValueError(f"a box of tensor {job.name} would not fill its place; this is a fault of qtp")
            filled[slot.file].append((slot.offset, slot.offset + slot.size))
    for output, places in zip(outputs, filled, strict=True):
        places.sort()
        if [start for start, _ in places] + [output.size] != [0] + [stop for _, stop in places]:
            raise ValueError(f"the tensors of {output.path} would not lie one after the other; this is a fault of qtp")


@cache
def _covers(shape: tuple[int, ...], boxes: tuple[Box, ...]) -> bool:
    inside = all(r.start >= 0 and r.stop <= n for box in boxes for r, n in zip(box, shape, strict=True))
    return inside and (multiplicity(shape, list(boxes))[0] > 0 or not prod(shape))
