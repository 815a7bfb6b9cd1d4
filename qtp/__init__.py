"""qtp: a distributed tensor-parallel runtime for the Qwen family."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtp.engine.outputs import CompletionOutput, RequestOutput
    from qtp.engine.sampling_params import SamplingParams
    from qtp.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]

_HOMES = {
    "LLM": "qtp.llm",
    "SamplingParams": "qtp.engine.sampling_params",
    "RequestOutput": "qtp.engine.outputs",
    "CompletionOutput": "qtp.engine.outputs",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: parts that need no torch stay free of it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qtp' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
