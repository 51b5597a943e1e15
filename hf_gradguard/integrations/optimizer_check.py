"""An optimizer for a model whose learning rates have to be scaled is looked at before its first step.

A rule such as CompleteP is half in the model and half in the optimizer. An optimizer that was made without the second
half trains all the same, and badly, so it is refused: by the guard where there is one, and else by a hook of torch on
the first step of any optimizer.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

MARK = "scaled_for"
"""The key of a parameter group that says for which rule its options are scaled. It is saved with the optimizer."""


class OptimizerCheck:
    """Sees that one model is stepped only by optimizers whose groups are scaled for its rule, as long as the model and
    this are alive.

    A copy of the model, also one from a file, has a check of its own.

    Args:
        model: the patched model.
        rule: its rule as text, such as `completep:base_depth=4`.
    """

    def __init__(self, model: nn.Module, rule: str) -> None:
        self._model = weakref.ref(model)
        self._rule = rule
        self._start()

    def _start(self) -> None:
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        _CHECKS.add(self)
        _hook.hang()

    def refuse(self, optimizer: Any) -> None:
        """Raises ValueError, with the line to write instead, if an optimizer steps the model and its groups are not
        scaled for the rule. One that is as it should be is not looked at again."""
        model, optimizer = self._model(), getattr(optimizer, "optimizer", optimizer)  # what Accelerate has wrapped
        if model is None or optimizer in self._seen:
            return
        own = {id(parameter) for parameter in model.parameters()}
        groups = [group for group in optimizer.param_groups if any(id(p) in own for p in group["params"])]
        for group in groups:
            if group.get(MARK) != self._rule:
                raise ValueError(self._message(model, optimizer, group.get(MARK)))
        if isinstance(optimizer, Optimizer):
            self._seen.add(optimizer)

    def _message(self, model: nn.Module, optimizer: Any, found: str | None) -> str:
        first = optimizer.param_groups[0]
        rate = first.get("initial_lr", first.get("lr"))
        decay = max(group.get("weight_decay", 0.0) for group in optimizer.param_groups)
        was_made = "was made without that" if found is None else f"was made for residual={found!r}"
        line = f"{type(optimizer).__name__}(param_groups(model, lr={_number(rate)}, weight_decay={_number(decay)}))"
        return (
            f"residual={self._rule!r} scales learning rates and epsilon, and the optimizer of this "
            f"{type(model).__name__} {was_made}. Write\n"
            f"    Trainer(…, optimizers=({line}, None))\n"
            f"or, in a loop of your own, optimizer = {line}, after `from hf_gradguard import param_groups`"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model(), "rule": self._rule}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = weakref.ref(state["model"])
        self._rule = state["rule"]
        self._start()


def refuse(optimizer: Any) -> None:
    """Raises ValueError for an optimizer that steps a patched model and should have been made otherwise."""
    for check in list(_CHECKS):
        check.refuse(optimizer)


class _Hook:
    """The hook of torch before every optimizer's step, from the first check on."""

    def __init__(self) -> None:
        self._handle: RemovableHandle | None = None

    def hang(self) -> None:
        """Sees that the hook is there. It is never taken away: torch may be going through its hooks just then."""
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _CHECKS:
        refuse(optimizer)


_CHECKS: weakref.WeakSet[OptimizerCheck] = weakref.WeakSet()
_hook = _Hook()


def _number(value: Any) -> str:
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError):
        return "…"
