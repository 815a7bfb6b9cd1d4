"""The kernel of `cuda_ipc`. N ranks, P programs, B elements of a program.

Each rank has a segment, which all the others write to: N slots for the tensors of the ranks, twice (two halves), and one flag for
each program and each rank, twice. A program takes PROGRAM_BYTES of the tensor, the same part of every slot whatever the dtype,
and has a turn of its own, which it counts in the segment, so that a CUDA graph can hold it. In turn t, program p of each rank

1. writes its part to its rank's slot in half t % 2 of all other segments, and then t to its flag there (release);
2. waits until the flags of all ranks in its own segment say t (acquire), and adds up what lies in the slots, in rank order.

One wait a call suffices: whoever writes half t % 2 again, in turn t + 2, has seen the flags of turn t + 1, which the others set
after they had read turn t. Programs wait for their like on other ranks only, never for each other, so not all of them need find
room on the device at once.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from collectives.cuda_segment import ABORT, LATE, PROGRAM_BYTES, TABLE, Segment

_WARPS = 8  # 16 bytes a thread
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_PART, _TABLE = tl.constexpr(PROGRAM_BYTES), tl.constexpr(TABLE)
_ABORT, _LATE = tl.constexpr(4 * ABORT), tl.constexpr(4 * LATE)


@triton.jit
def _clock(polls):
    """Nanoseconds; under the interpreter, which has no clock, how often one looked."""
    if _INTERPRETED:
        return polls
    return globaltimer()


@triton.jit
def _read(address):
    """The int32 at `address`, in memory that others write to (acquire)."""
    if _INTERPRETED:
        return tl.load(address.to(tl.pointer_type(tl.int32)))
    return tl.inline_asm_elementwise("ld.acquire.sys.global.b32 $0, [$1];", "=r,l", [address], tl.int32, is_pure=False, pack=1)


@triton.jit
def _publish():
    """What the threads of this program wrote before is seen by whoever sees what its first thread writes from here on."""
    tl.debug_barrier()
    if not _INTERPRETED:
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred first;
                .reg .b32 thread;
                mov.u32 thread, %tid.x;
                setp.eq.u32 first, thread, 0;
                @first fence.acq_rel.sys;
                mov.u32 $0, 0;
            }
            """,
            "=r",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _raise(flag, turn):
    """The flag, an int32 that another rank reads, says `turn`. The first thread does it."""
    if _INTERPRETED:
        tl.store(flag.to(tl.pointer_type(tl.int32)), turn)
    else:
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred first;
                .reg .b32 thread;
                mov.u32 thread, %tid.x;
                setp.eq.u32 first, thread, 0;
                @first st.relaxed.sys.global.b32 [$1], $2;
                mov.u32 $0, 0;
            }
            """,
            "=r,l,r",
            [flag, turn],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _tell(word, value):
    """int32 `value` to `word`. Every thread that comes here does it: threads look at the clock by themselves."""
    if _INTERPRETED:
        tl.store(word.to(tl.pointer_type(tl.int32)), value)
    else:
        asm: tl.constexpr = "st.relaxed.sys.global.b32 [$1], $2; mov.u32 $0, 0;"
        tl.inline_asm_elementwise(asm, "=r,l,r", [word, value], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _wait(flag, turn, segment, words, timeout, PEER: tl.constexpr):
    """Until the flag says `turn`; for `timeout` nanoseconds at most, less if the host says so, or if a wait was given up before:
    then the sum is of no use, and the word of the segment says so, as does the host's if it was for time."""
    if _read(flag) != turn:
        begin, polls, waits = _clock(0), 0, 1
        while waits == 1:
            polls += 1
            if _read(flag) == turn:
                waits = 0
            elif (polls & 255) == 0:  # a look at the host's memory takes as long as many at the flag
                late = _clock(polls) - begin > timeout
                if late:
                    _tell(words + _LATE, PEER + 1)
                if late | (_read(segment) != 0) | (_read(words + _ABORT) != 0):
                    _tell(segment, 1)
                    waits = 0


@triton.jit(do_not_specialize=["timeout"])
def one_step(
    x_ptr,
    segment,
    words,
    n,
    timeout,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TURNS: tl.constexpr,
    FLAGS: tl.constexpr,
    SLOTS: tl.constexpr,
    WRITES: tl.constexpr,
    SUMS: tl.constexpr,
):
    """x [n] becomes the sum over all ranks. segment: this rank's; words: the host's; both as addresses. BLOCK_B: PROGRAM_BYTES in
    elements; a program for each, begun. WRITES, SUMS: the two steps, which tests take one by one."""
    program = tl.program_id(0)
    at_B = program * BLOCK_B + tl.arange(0, BLOCK_B)
    inside_B = at_B < n
    segment, words = segment.to(tl.int64), words.to(tl.int64)
    turn_ptr = (segment + TURNS).to(tl.pointer_type(tl.int32)) + program
    segments_ptr = (segment + _TABLE).to(tl.pointer_type(tl.int64))
    turn = tl.load(turn_ptr) + 1
    half = turn & 1
    x_B = tl.load(x_ptr + at_B, mask=inside_B, other=0)
    flag = FLAGS + (half * PROGRAMS + program) * SIZE * 4
    slot = SLOTS + half * SIZE * PROGRAMS * _PART
    if WRITES:
        for i in tl.static_range(1, SIZE):
            theirs = tl.load(segments_ptr + (RANK + i) % SIZE) + slot + RANK * PROGRAMS * _PART
            theirs_ptr = tl.multiple_of(theirs.to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
            tl.store(theirs_ptr + at_B, x_B, mask=inside_B)
        _publish()
        if _read(segment) == 0:  # else what is written comes of a sum that was given up, and the others should not take it
            for i in tl.static_range(1, SIZE):
                _raise(tl.load(segments_ptr + (RANK + i) % SIZE) + flag + RANK * 4, turn)
    if SUMS:
        for r in tl.static_range(SIZE):
            if r != RANK:
                _wait(segment + flag + r * 4, turn, segment, words, timeout, r)
        WIDE: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int32 else tl.float32
        for r in tl.static_range(SIZE):
            if r == RANK:
                part_B = x_B.to(WIDE)
            else:
                ours = segment + slot + r * PROGRAMS * _PART
                ours_ptr = tl.multiple_of(ours.to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
                part_B = tl.load(ours_ptr + at_B, mask=inside_B, other=0, cache_modifier=".cg").to(WIDE)
            if r == 0:
                sum_B = part_B
            else:
                sum_B += part_B
        tl.store(x_ptr + at_B, sum_B.to(x_ptr.dtype.element_ty), mask=inside_B)
        tl.store(turn_ptr, turn)


def launch(x: Tensor, segment: Segment, rank: int, size: int, timeout: float, *, writes: bool = True, sums: bool = True) -> None:
    """x, contiguous, of an aligned address and no larger than the segment was made for, becomes the sum over all ranks. timeout:
    seconds to wait for another one. writes, sums: whether to take each of the two steps."""
    block, layout = PROGRAM_BYTES // x.element_size(), segment.layout
    one_step[(triton.cdiv(x.numel(), block),)](
        x,
        segment.address,
        segment.words_address,
        x.numel(),
        int(timeout * 1e9),
        RANK=rank,
        SIZE=size,
        BLOCK_B=block,
        PROGRAMS=layout.programs,
        TURNS=layout.turns,
        FLAGS=layout.flags,
        SLOTS=layout.slots,
        WRITES=writes,
        SUMS=sums,
        num_warps=_WARPS,
    )
