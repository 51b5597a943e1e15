"""See and guard the gradient of every layer while training with Hugging Face Trainer or Accelerate.

Example:
    >>> from hf_gradguard import GradGuardCallback
    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[GradGuardCallback()])  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_gradguard.callback import GradGuardCallback
    from hf_gradguard.config import GradGuardConfig
    from hf_gradguard.guard import GradGuard
    from hf_gradguard.record.reader import RunRecord

__version__ = "0.1.0"
__all__ = ["GradGuard", "GradGuardCallback", "GradGuardConfig", "RunRecord"]

_HOME = {
    "GradGuard": "guard",
    "GradGuardCallback": "callback",
    "GradGuardConfig": "config",
    "RunRecord": "record.reader",
}


def __getattr__(name: str) -> Any:
    # Only what is asked for is imported: reading a record does not need torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
