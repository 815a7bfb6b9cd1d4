"""What the tests of native code share."""

from collections.abc import Iterator

import pytest
import torch

from qtp.kernels.extension import native

ISAS = tuple(enumerate(native.isas() if native is not None else ()))


@pytest.fixture(params=ISAS, ids=[name for _, name in ISAS])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that the processor has, by name; the kernels use it meanwhile."""
    native.use_isa(request.param[0])
    yield request.param[1]
    native.use_isa(len(ISAS) - 1)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
