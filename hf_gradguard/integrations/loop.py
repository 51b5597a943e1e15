"""What a loop of one's own does not tell the guard: with which inputs the model was called."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from hf_gradguard.guard import GradGuard


class ForwardPasses:
    """Tells the guard of each training forward pass of the model, until `remove`.

    A loss that the model returns is back-propagated when the pass is repeated; where the loop computes its own, the
    forward pass alone is.
    """

    def __init__(self, model: nn.Module, guard: GradGuard) -> None:
        self._guard = weakref.ref(guard)
        self._hook = model.register_forward_pre_hook(self._before, with_kwargs=True)

    def remove(self) -> None:
        """Lets go of the model."""
        self._hook.remove()

    def __reduce__(self) -> Any:
        # A copy of the model, also one on disk, is nobody's to watch.
        return _Nobody, ()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        guard = self._guard()
        if guard is None or not (model.training and torch.is_grad_enabled()):
            return

        def run() -> None:
            output = model(*args, **kwargs)
            loss = output.get("loss") if isinstance(output, dict) else None
            if loss is not None:
                loss.backward()

        guard.begin_micro_batch(run, {**{f"input_{place}": value for place, value in enumerate(args)}, **kwargs})


class _Nobody(ForwardPasses):
    """Stands in a copy of the model where the guard stood."""

    def __init__(self) -> None:
        pass

    def _guard(self) -> None:  # type: ignore[override]
        return None
