"""Memory of CUDA cards that the ranks of one host share: what `cuda_ipc` works on. N ranks, P programs of its kernel.

Each rank allocates a segment and opens those of the others by handles that travel over another communicator as text. Nobody
writes to a segment after its rank's last sum is done, so that a rank may free its own then.
"""

import json
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from collectives.communicator import Communicator
from collectives.cuda_driver import CudaDriver, DriverError, Words
from collectives.network import machine_identity
from collectives.shm import exchange_over

PROGRAM_BYTES = 4096
TABLE = 64  # offset of the addresses of the segments, int64 [N]; the first word tells that a wait was given up
_PAGE = 4096
_WORD = 4
_WAY_OUT = "choose nccl, or gloo where ranks share a card"

# Words in the host's memory. Not 0: give up waiting; 1 + the rank that did not come.
ABORT, LATE, _WORDS = 0, 1, 2


class Layout(NamedTuple):
    """Offsets in a segment, in bytes. turns: int32 [P]; flags: int32 [2, P, N]; slots: [2, N, P * PROGRAM_BYTES]."""

    programs: int
    turns: int
    flags: int
    slots: int
    total: int

    @classmethod
    def of(cls, size: int, limit: int) -> "Layout":
        """For tensors of up to `limit` bytes, a multiple of PROGRAM_BYTES."""
        programs = limit // PROGRAM_BYTES
        turns = TABLE + 8 * size
        flags = turns + _WORD * programs
        slots = -(-(flags + 2 * programs * size * _WORD) // _PAGE) * _PAGE
        return cls(programs, turns, flags, slots, slots + 2 * size * limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Card:
    """What a rank tells the others. handle: of its segment, in hexadecimal. trouble: why it has none."""

    machine: str
    handle: str = ""
    trouble: str = ""


class Segment:
    """This rank's memory, and the others' as far as it has been opened."""

    def __init__(self, driver: CudaDriver, size: int, limit: int) -> None:
        self.layout = Layout.of(size, limit)
        self._driver = driver
        self._theirs: list[int] = []
        self._lock = threading.Lock()
        self._words: Words | None = None
        self.address = driver.allocate(self.layout.total)
        try:
            self.words_address, self._words = driver.allocate_words(_WORDS)
            self.handle = driver.handle(self.address)
        except BaseException:
            self.release()
            raise

    def open(self, handles: Sequence[bytes], rank: int) -> None:
        """Those of the other ranks, whose addresses the kernel reads from this one."""
        addresses = [self.address if other == rank else self._opened(other, handle) for other, handle in enumerate(handles)]
        self._driver.write(self.address + TABLE, b"".join(address.to_bytes(8, "little") for address in addresses))

    def _opened(self, rank: int, handle: bytes) -> int:
        try:
            self._theirs.append(self._driver.open(handle))
        except DriverError as error:
            raise DriverError(f"cannot open the memory of rank {rank}: {error}") from None
        return self._theirs[-1]

    def late(self) -> int:
        """The rank that a kernel has waited for in vain, -1 if there is none."""
        return -1 if self._words is None else self._words[LATE] - 1

    def abort(self) -> None:
        """May be called while another thread releases."""
        with self._lock:
            if self._words is not None:
                self._words[ABORT] = 1

    def release(self) -> int:
        """Frees all, once the device is done with it; `late` as it was then. What fails here has failed before."""
        with suppress(RuntimeError):
            self._driver.synchronize()
        for address in self._theirs:
            with suppress(RuntimeError):
                self._driver.close(address)
        with self._lock:
            late, words, self._words = self.late(), self._words, None
        with suppress(RuntimeError):
            if words is not None:
                self._driver.free_words(words)
        with suppress(RuntimeError):
            self._driver.free(self.address)
        return late


def connect(inner: Communicator, limit: int, driver: CudaDriver | None) -> Segment:
    """Segments of all ranks of `inner`, each open to all. ValueError on every rank, with all released, if one has trouble."""
    tell = exchange_over(inner)
    segment: Segment | None = None
    card = _Card(machine=machine_identity())
    try:
        try:
            segment = Segment(driver or CudaDriver(inner.device), inner.size, limit)
            card = replace(card, handle=segment.handle.hex())
        except DriverError as error:
            card = replace(card, trouble=str(error))
        cards = [_Card(**json.loads(blob)) for blob in tell(json.dumps(asdict(card)).encode())]
        trouble = card.trouble
        if segment is not None and not any(other.trouble for other in cards):
            trouble = _opened(segment, cards, inner.rank)
        for rank, told in enumerate(tell(trouble.encode())):
            if told:
                raise ValueError(f"communicator 'cuda_ipc': rank {rank}: {told.decode()}; {_WAY_OUT}")
        assert segment is not None
        return segment
    except BaseException:
        if segment is not None:
            segment.release()
        raise


def _opened(segment: Segment, cards: Sequence[_Card], rank: int) -> str:
    """Why the memory of `cards` cannot be had; "" if it now can."""
    far = next((other for other, card in enumerate(cards) if card.machine != cards[rank].machine), None)
    if far is not None:
        return f"it is not on the host of rank {far} (or in another container)"
    try:
        segment.open([bytes.fromhex(card.handle) for card in cards], rank)
    except DriverError as error:
        return str(error)
    return ""
