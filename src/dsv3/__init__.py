"""DeepSeek-V3, whole: the model, its checkpoints, training, and an engine to run it.

    from dsv3 import LLM, SamplingParams
    LLM("nano").chat([{"role": "user", "content": "Hello"}])[0].text

What is named here is loaded when it is first used: `import dsv3` alone does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv3.checkpoint.pretrained import DeepseekV3
    from dsv3.config import ModelConfig
    from dsv3.engine.llm import LLM, RequestOutput
    from dsv3.engine.sampling import SamplingParams

    __version__: str

__all__ = ["LLM", "DeepseekV3", "ModelConfig", "RequestOutput", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "dsv3.engine.llm",
    "RequestOutput": "dsv3.engine.llm",
    "SamplingParams": "dsv3.engine.sampling",
    "DeepseekV3": "dsv3.checkpoint.pretrained",
    "ModelConfig": "dsv3.config",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("dsv3")
        except PackageNotFoundError:  # run from a source tree that is not installed
            value = "0+source"
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'dsv3' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
