"""Where ranks meet."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendezvous:
    """What a launcher hands to each rank.

    rank, size: this rank among all; local_rank, local_size: among those of this host.
    address, port: where rank 0's store listens (for backends that need one).
    attempt: how often the launcher has restarted the ranks; keeps keys in a served store apart.
    served: the launcher itself serves the store there (torchrun's agent does); otherwise rank 0 does.
    listener: file descriptor of a socket that already listens on (address, port), rank 0 only; None: rank 0 binds.
    token: the secret of this run, or "" if the launcher gave none. timeout: seconds for joining and for each collective.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    attempt: int = 0
    served: bool = False
    listener: int | None = None
    token: str = field(default="", repr=False)
    timeout: float = 300.0

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.size and 0 <= self.local_rank < self.local_size <= self.size):
            raise ValueError(
                f"rank {self.rank} of {self.size} (local {self.local_rank} of {self.local_size}) makes no sense; "
                "RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must come from one launcher"
            )
