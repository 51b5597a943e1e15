"""Layer-sequential unit-variance initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from hf_gradguard.act.checks import check_above_zero
from hf_gradguard.observe.random_state import RandomState
from hf_gradguard.patch.anatomy import Anatomy, Branch
from hf_gradguard.patch.init.initialisation import Initialisation, Site, draw_orthogonal, inits


@inits.register("lsuv")
@dataclass
class LSUV(Initialisation):
    """Orthogonal; then the output projection of each branch is divided by the standard deviation of what the branch
    puts out, measured on a batch.

    Dmytro Mishkin, Jiri Matas 2015, "All you need is a good init", arXiv 1511.06422, algorithm 1. Measured is what a
    branch gives to the residual addition, over all positions of the batch (padding too) and all channels, before any
    residual rule. The paper does it for every linear layer, one after the other with a forward pass for each step; here
    one pass does it for all branches, in the order in which they run: each projection is divided as soon as it has
    given its output, which it then gives anew. To divide its output instead would be the same but for rounding, and a
    post-norm model of 1000 layers makes 3 % of that. A second pass sees whether it worked.

    The model runs without dropout and gradients, twice. Its modes, gradients, buffers and all random generators are
    afterwards as they were, but for the draws of the orthogonal matrices. Several processes need the same batch.
    """

    summary = "orthogonal, then each branch's output brought to standard deviation 1 on a batch"
    citation = "Mishkin & Matas 2015, arXiv 1511.06422"
    needs_batch = True

    tolerance: float = 0.01
    """How far from 1 a standard deviation may be. The paper has 0.1, for the variance."""

    def __post_init__(self) -> None:
        check_above_zero(tolerance=self.tolerance)

    def weight(self, site: Site, generator: Generator | None) -> Tensor:
        """See `Initialisation`."""
        return draw_orthogonal(site.part.shape, generator)

    def fill(self, anatomy: Anatomy, batch: Mapping[str, Any] | None, generator: Generator | None) -> None:
        """See `Initialisation`.

        Raises:
            TypeError: the batch is no mapping.
            ValueError: the batch does not reach a branch, or a branch's output has no standard deviation that can be
                brought to 1. The weights are new then, but not all divided.
        """
        if not isinstance(batch, Mapping):
            raise TypeError(f"batch is a {type(batch).__name__}; give what the model's forward takes, by name")
        super().fill(anatomy, batch, generator)
        divided = _Seen(batch)
        divided.run(anatomy, [(branch, branch.output.module, divided.divide) for branch in anatomy.branches])
        # What stands between the projection and the end of the branch is seen only in the whole model as it now is.
        result = _Seen(batch)
        result.run(anatomy, [(branch, branch.end, result.measure) for branch in anatomy.branches])
        for branch, std in result.stds.items():
            if not abs(std - 1) <= self.tolerance:
                raise ValueError(
                    f"init='lsuv': the output of {branch} has standard deviation {std:.3g} after it was divided, not 1 "
                    f"within tolerance={self.tolerance}; something after its output projection, a norm maybe, changes "
                    "the scale (use init='orthogonal'), or the model's dtype is too coarse for this tolerance"
                )


class _Seen:
    """What passes of a batch through the model show.

    Args:
        batch: what the model's forward takes.
    """

    def __init__(self, batch: Mapping[str, Any]) -> None:
        self.batch = batch
        self.stds: dict[Branch, float] = {}

    def run(self, anatomy: Anatomy, hooks: Sequence[tuple[Branch, nn.Module, Callable[..., Any]]]) -> None:
        """One pass, with a hook for each branch on a module of it."""
        # In front of other hooks: those of a residual rule change what they are given.
        handles = [module.register_forward_hook(partial(hook, branch), prepend=True) for branch, module, hook in hooks]
        model = anatomy.model
        try:
            with _undisturbed(model):
                model(**{name: _on(model, value) for name, value in self.batch.items()})
        finally:
            for handle in handles:
                handle.remove()
        if missed := [branch for branch in anatomy.branches if branch not in self.stds]:
            raise ValueError(
                f"init='lsuv': the {missed[0]} took no part in the forward pass, and neither did {len(missed) - 1} "
                f"others; the batch has {', '.join(self.batch)}. Give all that training gives, such as "
                "encoder_hidden_states"
            )

    def measure(self, branch: Branch, module: nn.Module, args: Any, output: Any) -> None:
        """After a module: the standard deviation of what it gives."""
        y: Tensor = output[0] if isinstance(output, tuple) else output
        self.stds[branch] = y.float().std(correction=0).item()

    def divide(self, branch: Branch, module: nn.Module, args: Any, output: Any) -> Any:
        """After the output projection: divides its weight, and lets the pass go on with what it gives now."""
        self.measure(branch, module, args, output)
        std = self.stds[branch]
        if not 0 < std < math.inf:
            raise ValueError(
                f"init='lsuv': the output of {branch} has standard deviation {std} on this batch, so that nothing can "
                "bring it to 1; give a batch of several different tokens, and look at the norms before it"
            )
        branch.output.write(branch.output.read().float() / std)
        return module.forward(*args)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards modes, buffers and random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    state = RandomState.capture()
    model.eval()
    try:
        yield
    finally:
        state.restore()
        for module, is_training in modes:
            module.training = is_training
        for module, name, buffer, values in buffers:
            setattr(module, name, buffer)  # a module may have put another in its place
            buffer.copy_(values)


def _on(model: Any, value: Any) -> Any:
    return value.to(model.device) if isinstance(value, torch.Tensor) else value
