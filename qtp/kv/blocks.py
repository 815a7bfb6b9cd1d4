"""The free list of KV blocks. Plain Python; rank 0's alone: the other ranks are told which blocks a sequence got."""

from collections import deque


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. The block that was freed longest ago is given out first.

    A block is free or owned by exactly one caller; giving back a block that is free is a bug and asserts.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = deque(range(num_blocks))
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def needed(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def take(self, count: int) -> list[int] | None:
        """`count` blocks, or None and nothing taken if there are not as many."""
        if count > len(self._free):
            return None
        blocks = [self._free.popleft() for _ in range(count)]
        self._taken.update(blocks)
        return blocks

    def give_back(self, blocks: list[int]) -> None:
        assert self._taken.issuperset(blocks), f"blocks {blocks} are not all taken"
        assert len(set(blocks)) == len(blocks), f"blocks {blocks} are not distinct"
        self._taken.difference_update(blocks)
        self._free.extend(blocks)
