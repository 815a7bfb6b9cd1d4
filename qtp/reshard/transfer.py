"""Moves the bytes of jobs: long reads of the source, positioned writes to files of their final size, a checksum on the way."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from math import prod

import numpy as np
import xxhash

from qtp.layout.split import Box, elements
from qtp.reshard.cut import Job
from qtp.weights.checkpoint import Checkpoint
from qtp.weights.store import ITEM_SIZE

Convert = Callable[[memoryview, str, str], memoryview]

_WRITE = 1 << 18  # bytes of a write: with 1 MiB the page cache took up to twice the system time, with 64 KiB a third more
_FLUSH = 0.3  # seconds between two flushes


def pieces(box: Box, most: int) -> Iterator[Box]:
    """A box in pieces along dimension 0, of at most `most` elements where one row is not more; nothing of an empty one."""
    if not elements(box):
        return
    if not box:
        yield box
        return
    step = max(1, most // elements(box[1:]))
    for first in range(box[0].start, box[0].stop, step):
        yield (range(first, min(first + step, box[0].stop)), *box[1:])


class Transfer:
    """Carries out jobs, several at once. `files`: a descriptor for each output; `chunk`: bytes of a read, of which a thread needs
    one for what it reads, one for what it cuts out and two for what it converts."""

    def __init__(self, source: Checkpoint, files: Sequence[int], chunk: int, workers: int, convert: Convert) -> None:
        self._source, self._files, self._chunk, self._convert = source, files, chunk, convert
        self._workers = workers
        self._own = threading.local()
        self._stop = threading.Event()

    def run(self, jobs: Sequence[Job], done: Callable[[Job, list[str]], None], progress: Callable[[int], None]) -> None:
        """Copies all jobs; `done` gets each with the checksums of its slots when its bytes are written, `progress` the number of
        bytes after each write, both in the thread that did it. Ends early with what any of them raises."""
        ended = threading.Event()
        flusher = ThreadPoolExecutor(1, "flusher")
        flushed = flusher.submit(self._flush, ended)
        try:
            self._each(jobs, lambda job: done(job, self._copy(job, progress)))
        finally:
            ended.set()
            flusher.shutdown()
        flushed.result()

    def _flush(self, ended: threading.Event) -> None:
        """Keeps the disk busy meanwhile, so that little is left to wait for at the end."""
        while not ended.wait(_FLUSH):
            for file in self._files:
                os.fdatasync(file)

    def checked(self, jobs: Sequence[Job], known: dict[str, list[str]], progress: Callable[[int], None]) -> set[str]:
        """The names of those jobs whose bytes are in the files with the checksums that are known."""
        good: set[str] = set()

        def look(job: Job) -> None:
            if known.get(job.name) == [self._sum(slot.file, slot.offset, slot.size) for slot in job.slots]:
                good.add(job.name)
                progress(job.bytes)

        self._each([job for job in jobs if job.name in known], look)
        return good

    def _each(self, jobs: Sequence[Job], work: Callable[[Job], None]) -> None:
        self._stop.clear()
        pool = ThreadPoolExecutor(self._workers, "transfer")
        try:
            finished, _ = wait([pool.submit(work, job) for job in jobs], return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)

    def _copy(self, job: Job, progress: Callable[[int], None]) -> list[str]:
        sums = [xxhash.xxh3_128() for _ in job.slots]
        at = [slot.offset for slot in job.slots]
        for number, name in enumerate(job.sources):
            entry = self._source.entries[name]
            item = ITEM_SIZE[entry.dtype]
            takers = [(i, slot.taken[number]) for i, slot in enumerate(job.slots) if elements(slot.taken[number])]
            for box in pieces(tuple(range(n) for n in entry.shape), self._chunk // item):
                wanted = [(i, inner) for i, taken in takers if elements(inner := _rows(taken, box))]
                if not wanted:
                    continue
                if self._stop.is_set():
                    raise InterruptedError("another job failed")
                raw = self._buffer("read", elements(box) * item)
                self._source.read_into(name, box, raw)
                for i, inner in wanted:
                    data = taken_out(raw, box, inner, item, self._cut_out)
                    if job.dtype != entry.dtype:
                        data = self._convert(data, entry.dtype, job.dtype)
                    sums[i].update(data)
                    write_fully(self._files[job.slots[i].file], data, at[i])
                    at[i] += data.nbytes
                    progress(data.nbytes)
        assert at == [slot.offset + slot.size for slot in job.slots], job.name
        return [x.hexdigest() for x in sums]

    def _sum(self, file: int, offset: int, size: int) -> str:
        x = xxhash.xxh3_128()
        for first in range(offset, offset + size, self._chunk):
            if self._stop.is_set():
                raise InterruptedError("another job failed")
            count = min(self._chunk, offset + size - first)
            raw = self._buffer("read", count)
            if os.preadv(self._files[file], [raw], first) != count:
                return ""
            x.update(raw)
        return x.hexdigest()

    def _cut_out(self, size: int) -> memoryview:
        return self._buffer("cut", size)

    def _buffer(self, use: str, size: int) -> memoryview:
        """Memory of this thread that is used again: fresh memory would cost a page fault for each 4 KiB."""
        own: bytearray = getattr(self._own, use, bytearray())
        if len(own) < size:
            own = bytearray(size)
            setattr(self._own, use, own)
        return memoryview(own)[:size]


def _rows(taken: Box, piece: Box) -> Box:
    """What of `taken` lies in a piece of the whole tensor that was cut along dimension 0."""
    if not taken:
        return taken
    first, stop = max(taken[0].start, piece[0].start), min(taken[0].stop, piece[0].stop)
    return (range(first, max(first, stop)), *taken[1:])


def taken_out(raw: memoryview, box: Box, inner: Box, item: int, memory: Callable[[int], memoryview]) -> memoryview:
    """The bytes of a box inside `box`, whose bytes are `raw`, in one piece: a part of `raw` where it lies so, else copied to
    `memory` of that size."""
    within = tuple(range(r.start - b.start, r.stop - b.start) for r, b in zip(inner, box, strict=True))
    shape = tuple(len(r) for r in box)
    if within[1:] == tuple(range(n) for n in shape[1:]):
        row = prod(shape[1:]) * item
        return raw[within[0].start * row : within[0].stop * row] if within else raw
    whole = np.frombuffer(raw, np.uint8).reshape(*shape, item)
    out = memory(elements(inner) * item)
    part = whole[tuple(slice(r.start, r.stop) for r in within)]
    np.copyto(np.frombuffer(out, np.uint8).reshape(part.shape), part)  # lets other threads run, unlike a loop over rows
    return out


def write_fully(file: int, data: memoryview | bytes, offset: int) -> None:
    data = memoryview(data)
    while data.nbytes:
        written = os.pwrite(file, data[:_WRITE], offset)
        data, offset = data[written:], offset + written


def as_it_is(data: memoryview, stored: str, wanted: str) -> memoryview:
    """The conversion of a reshard that converts nothing."""
    raise AssertionError(f"{stored} was not to become {wanted}")
