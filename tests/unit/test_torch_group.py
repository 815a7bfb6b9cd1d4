"""What the process groups of torch must not be asked."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from collectives.communicator import CollectiveError, Communicator
from collectives.torch_group import GLOO, TorchGroup

X = torch.ones(2)
OPERATIONS: dict[str, Callable[[Communicator], Any]] = {
    "all_reduce": lambda comm: comm.all_reduce(X.clone()),
    "all_gather": lambda comm: comm.all_gather(X),
    "reduce_scatter": lambda comm: comm.reduce_scatter(X),
    "broadcast": lambda comm: comm.broadcast(X.clone()),
    "all_to_all": lambda comm: comm.all_to_all([X, X]),
    "barrier": lambda comm: comm.barrier(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_is_begun_after_an_abort(name: str) -> None:
    """nccl holds a lock in its abort until no graph has its work any more, and takes the same one for each operation: who frees
    the graphs must not wait there. Within a capture, what it begins before it refuses would be left over."""
    group, ended = Mock(), Mock()
    rendezvous: Any = None
    backend = replace(GLOO, group=lambda *_: group, abort=ended, blocks=False, scatters=True)
    comm = TorchGroup(backend, None, 0, 2, rendezvous, torch.device("cpu"))
    comm.abort()
    with pytest.raises(CollectiveError, match=r"gloo: the communicator was aborted"):
        OPERATIONS[name](comm)
    assert not group.mock_calls
    ended.assert_called_once_with(group)
