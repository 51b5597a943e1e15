"""See and guard the gradient of every layer while training with Hugging Face Trainer or Accelerate.

Example:
    >>> from hf_gradguard import GradGuardCallback
    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[GradGuardCallback()])  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from hf_gradguard.callback import GradGuardCallback
    from hf_gradguard.config import GradGuardConfig
    from hf_gradguard.guard import GradGuard
    from hf_gradguard.models.configuration import RecurrentConfig
    from hf_gradguard.models.modeling import RecurrentForCausalLM, RecurrentForSequenceClassification
    from hf_gradguard.patch.architectures import list_architectures, register_architecture
    from hf_gradguard.patch.catalogue import list_patches
    from hf_gradguard.patch.config import PatchConfig
    from hf_gradguard.patch.fold import fold_patches
    from hf_gradguard.patch.loading import load_patched
    from hf_gradguard.patch.model import patch_model, unpatch_model
    from hf_gradguard.patch.optimizer import param_groups
    from hf_gradguard.record.reader import RunRecord

__version__ = "0.1.0"
__all__ = [
    "GradGuard",
    "GradGuardCallback",
    "GradGuardConfig",
    "PatchConfig",
    "RecurrentConfig",
    "RecurrentForCausalLM",
    "RecurrentForSequenceClassification",
    "RunRecord",
    "fold_patches",
    "list_architectures",
    "list_patches",
    "load_patched",
    "param_groups",
    "patch_model",
    "register_architecture",
    "unpatch_model",
]

_HOME = {
    "GradGuard": "guard",
    "GradGuardCallback": "callback",
    "GradGuardConfig": "config",
    "PatchConfig": "patch.config",
    "RecurrentConfig": "models.configuration",
    "RecurrentForCausalLM": "models.modeling",
    "RecurrentForSequenceClassification": "models.modeling",
    "RunRecord": "record.reader",
    "fold_patches": "patch.fold",
    "list_architectures": "patch.architectures",
    "list_patches": "patch.catalogue",
    "load_patched": "patch.loading",
    "param_groups": "patch.optimizer",
    "patch_model": "patch.model",
    "register_architecture": "patch.architectures",
    "unpatch_model": "patch.model",
}

# `from_pretrained` must know patched checkpoints and recurrent models from now on; that is no reason to import
# Transformers here.
register_post_import_hook("hf_gradguard.integrations.loading:register", "transformers.quantizers")
register_post_import_hook("hf_gradguard.integrations.auto:register", "transformers.models.auto.configuration_auto")


def __getattr__(name: str) -> Any:
    # Only what is asked for is imported: reading a record does not need torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
