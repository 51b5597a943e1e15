"""How a residual rule gets between a branch and the addition, without changing the model's code.

A layer computes x + y, y being the output of a branch. Two hooks reach that: one before a module to which x is an
argument keeps x, one after the module whose output is y returns G(x, y) − x instead. The model's own addition then
makes x + (G(x, y) − x): in a pre-norm model G(x, y) is the stream, in a post-norm model it is what the norm gets. A
rule that only scales y needs the second hook alone.

- Hooks are methods of modules that are children of the layer, so deepcopy, pickle, `.to` and `torch.compile` take them
  along. All that a patch adds to a layer lies in one child, `CONTAINER`; names of the model's own parameters stay.
- That child's name ends in `_norm`. Trainer gives no weight decay to anything whose name contains such a step, so none
  of a rule's parameters is decayed, whatever it is called.
- A rule gets y as it is added, after dropout, in every architecture. Where the dropout comes after the hook because it
  is no module of its own (OPT, BART), the taps do it, from the same random numbers, and the layer's rate is 0 for so
  long: G(x, y) − x must not go through it.
- In a layer with parallel residual one gate serves both branches: the first hook holds its y back (returns zeros), the
  last returns G(x, sum of the y) − x.
- x + (G − x) is rounded twice. It equals G bit for bit where G lies between x / 2 and 2 x, and where G = x + y and
  |y| ≤ |x|; else to about one unit in the last place of the larger of x and G. In bfloat16 this can be seen where a
  gate makes a large x small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from hf_gradguard.patch.anatomy import Anatomy, Branch, Layer, pretrained, read_architecture
from hf_gradguard.patch.residual.rule import Rule

CONTAINER = "gradguard_norm"
"""The child of each layer that holds its taps. What a patch adds beside rules (new norms, say) belongs there too."""

MakeRule = Callable[[Branch], Rule | None]
"""Makes the rule for a branch, or None to leave it as it is. The same rule given for several branches is shared: its
parameters are stored with the first of them."""


class _Passing:
    """What is on its way from a tap's first hook to its last.

    One for all taps of a model, as no two branches run at the same time. Recomputation under gradient checkpointing
    ends as soon as it has what it needs, maybe between two hooks: what is left then, with the graph that it hangs on,
    stays only until the next branch comes. In each tap it would stay until the next forward pass, for every layer.
    """

    def __init__(self) -> None:
        self.tap: Tap | None = None
        self.x: Tensor | None = None
        self.y: Tensor | None = None

    def take(self, tap: Tap) -> tuple[Tensor | None, Tensor | None]:
        """The x and the held y of a tap, None what it has not left here; nothing is here any more afterwards."""
        found = (self.x, self.y) if self.tap is tap else (None, None)
        self.tap = self.x = self.y = None
        return found

    def __getstate__(self) -> dict[str, None]:
        # tensors inside a graph can be neither copied nor pickled
        return {"tap": None, "x": None, "y": None}


class Tap(nn.Module):
    """The hooks of one rule on the branches that meet x in one addition, and the rule.

    Args:
        passing: what all taps of the model have in common.
        rule: a gate, a scaling, or None for a tap that does nothing but the layer's dropout.
        place: what it is in, for messages.
        argument: which argument of the module with the residual tap x is.
        dropout: rate of the dropout that the tap does in place of the layer.
        is_owner: whether the rule's parameters are stored here; False if another tap has the same rule.
    """

    def __init__(
        self,
        passing: _Passing,
        rule: nn.Module | None,
        place: str,
        argument: int | str,
        dropout: float,
        is_owner: bool,
    ) -> None:
        super().__init__()
        self.passing = passing
        self.rule = rule if is_owner else None
        self.shared = () if is_owner or rule is None else (rule,)  # in a tuple it is no child, and stored only once
        self.place = place
        self.argument = argument
        self.dropout = dropout

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the module that x goes into: keeps x until the branch ends."""
        if isinstance(self.argument, str):
            x = kwargs.get(self.argument)
        else:
            x = args[self.argument] if self.argument < len(args) else None
        if x is None:
            raise RuntimeError(
                f"{self.place}: {type(module).__name__} was called without the argument {self.argument!r} in which the "
                f"residual should be; it got {len(args)} positional arguments and {sorted(kwargs)}. Correct `residual` "
                "in the entry of this architecture"
            )
        self.passing.tap, self.passing.x, self.passing.y = self, x, None

    def scale(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the branch: scale(y), or y where there is no rule."""
        y = self._branch_output(output)
        rule: Any = self._rule
        return _with_first(output, y if rule is None else rule.scale(y).to(y.dtype))

    def hold(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the first of two parallel branches: keeps y for the gate, and adds nothing to the stream."""
        y = self._branch_output(output)
        self.passing.y = y
        return _with_first(output, torch.zeros_like(y))

    def join(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the branch, or the last of two parallel ones: G(x, y) − x."""
        y = self._branch_output(output)
        x, held = self.passing.take(self)
        rule: Any = self._rule
        if x is None:
            raise RuntimeError(
                f"{self.place}: the branch ended, but its residual was not seen in this forward pass. Another library "
                "may have replaced the module whose input it is; patch the model after that library has changed it"
            )
        y = y if held is None else y + held
        return _with_first(output, (rule(x, y) - x).to(torch.promote_types(x.dtype, y.dtype)))

    @property
    def _rule(self) -> nn.Module | None:
        return self.shared[0] if self.shared else self.rule

    def _branch_output(self, output: Any) -> Tensor:
        y = output[0] if isinstance(output, tuple) else output
        return F.dropout(y, self.dropout, self.training) if self.dropout else y


@dataclass(eq=False)
class _End:
    """A hook on a branch's last linear module, which PEFT may replace."""

    path: str
    hook: Callable[..., Any]
    module: nn.Module
    handle: RemovableHandle


class LayerTaps(nn.Module):
    """The taps of one layer, each named after the branches that it serves."""

    def __init__(self, passing: _Passing, dropout: str | None) -> None:
        super().__init__()
        self.passing = passing
        self.dropout = dropout
        self.rate = 0.0
        self.handles: list[RemovableHandle] = []
        self.ends: list[_End] = []  # no children, as they are not modules: what they hold stays where it is

    def place(self, layer: Layer, rules: Sequence[_Assignment], owned: set[nn.Module]) -> None:
        """Hangs the hooks into a layer, and itself. Rules in `owned` are another tap's already; it adds its own."""
        if self.dropout is not None:
            self.rate = getattr(layer.module, self.dropout)
            setattr(layer.module, self.dropout, 0.0)
        for branches, rule in rules:
            place, argument = ", ".join(map(str, branches)), branches[0].residual.argument
            tap = Tap(self.passing, rule, place, argument, self.rate, rule not in owned)
            if rule is not None:
                owned.add(_like(rule, branches[0].output.weight))
            self.add_module("_".join(branch.kind for branch in branches), tap)
            self._hook(tap, rule, branches)
        if self.ends:
            self.handles.append(layer.module.register_forward_pre_hook(self.follow))
        layer.module.add_module(CONTAINER, self)
        self.train(layer.module.training)

    def follow(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the layer: takes a hook along to the module that stands where its own was, as PEFT's adapters do."""
        for end in self.ends:
            module = layer.get_submodule(end.path)
            if module is not end.module:
                end.handle.remove()
                end.module, end.handle = module, module.register_forward_hook(end.hook)

    def remove(self, layer: nn.Module) -> None:
        """Leaves the layer as it was before `place`."""
        for handle in [*self.handles, *(end.handle for end in self.ends)]:
            handle.remove()
        if self.dropout is not None:
            setattr(layer, self.dropout, self.rate)
        delattr(layer, CONTAINER)

    def _hook(self, tap: Tap, rule: nn.Module | None, branches: Sequence[Branch]) -> None:
        if not _is_gate(rule):
            self._after(branches[0], tap.scale)
            return
        self.handles.append(branches[0].residual.module.register_forward_pre_hook(tap.see, with_kwargs=True))
        for branch in branches[:-1]:
            self._after(branch, tap.hold)
        self._after(branches[-1], tap.join)

    def _after(self, branch: Branch, hook: Callable[..., Any]) -> None:
        handle = branch.end.register_forward_hook(hook)
        if branch.entry.end == branch.entry.output:
            self.ends.append(_End(branch.entry.end, hook, branch.end, handle))
        else:
            self.handles.append(handle)


def attach(model: nn.Module, make_rule: MakeRule) -> Anatomy:
    """Puts a rule on every residual branch of a model, in place.

    Rules get the device and dtype of their branch's output weight.

    Args:
        model: a model of a known architecture, see `read_architecture`. To be given to FSDP, DDP or `torch.compile`
            only afterwards; to PEFT before or afterwards, but before if it is to be compiled with `fullgraph`. Not for
            nn.DataParallel, whose replicas would all use the first one's rules.
        make_rule: called for each branch in depth order, before anything is changed. In a layer with parallel residual
            a gate made for the first branch serves all of them, and it is not called for the others.

    Returns:
        The model's anatomy.

    Raises:
        ValueError: the model is patched already, or its architecture is unknown, or only a later one of parallel
            branches got a gate.
        TypeError: something is no rule.
    """
    anatomy = read_architecture(model)
    if any(hasattr(layer.module, CONTAINER) for layer in anatomy.layers):
        raise ValueError(f"this {type(anatomy.model).__name__} is patched already; take the patch away first")
    assignments = [_assign(layer, make_rule) for layer in anatomy.layers]
    passing, owned = _Passing(), set[nn.Module]()
    for layer, rules in zip(anatomy.layers, assignments, strict=True):
        if any(rule is not None for _, rule in rules):
            LayerTaps(passing, layer.dropout).place(layer, rules, owned)
    return anatomy


def detach(model: nn.Module) -> None:
    """Takes all taps and rules out of a model; what its outputs were before, they are again, bit for bit.

    Raises:
        ValueError: there are none.
    """
    patched = [module for module in pretrained(model).modules() if hasattr(module, CONTAINER)]
    if not patched:
        raise ValueError(f"this {type(pretrained(model)).__name__} is not patched")
    for layer in patched:
        taps = getattr(layer, CONTAINER)
        taps.remove(layer)


_Assignment = tuple[Sequence[Branch], nn.Module | None]


def _assign(layer: Layer, make_rule: MakeRule) -> list[_Assignment]:
    """Each rule of a layer with the branches that it serves."""
    assignments: list[_Assignment] = []
    for first, *others in layer.junctions:
        rule = _checked(make_rule(first), first)
        if _is_gate(rule):
            assignments.append(((first, *others), rule))
            continue
        assignments.append(((first,), rule))
        for branch in others:
            other = _checked(make_rule(branch), branch)
            if _is_gate(other):
                raise ValueError(
                    f"{branch}: {type(other).__name__} is a gate, but this branch is added to the residual together "
                    f"with {first}, which has none; give the gate for {first}, where it serves both"
                )
            assignments.append(((branch,), other))
    return assignments


def _checked(rule: object, branch: Branch) -> nn.Module | None:
    if rule is None:
        return None
    if not isinstance(rule, nn.Module) or not (_is_scaling(rule) or _has_forward(rule)):
        raise TypeError(
            f"{branch}: {type(rule).__name__} is no residual rule; return an nn.Module with forward(x, y) or scale(y), "
            "or None"
        )
    return rule


def _has_forward(rule: nn.Module) -> bool:
    return type(rule).forward is not nn.Module.forward


def _is_gate(rule: nn.Module | None) -> bool:
    return rule is not None and not _is_scaling(rule)


def _is_scaling(rule: nn.Module) -> bool:
    # asked of the class, as a gate may have a parameter of that name
    return callable(getattr(type(rule), "scale", None))


def _like(rule: nn.Module, weight: Tensor) -> nn.Module:
    """The rule, with the device of a weight, and its dtype where that is one to compute in."""
    return rule.to(device=weight.device, dtype=weight.dtype if weight.is_floating_point() else None)


def _with_first(output: Any, first: Tensor) -> Any:
    """A module's output with another first tensor."""
    return (first, *output[1:]) if isinstance(output, tuple) else first
