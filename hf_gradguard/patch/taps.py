"""How a residual rule gets between a branch and the addition, without changing the model's code.

A layer computes x + y, y being the output of a branch. Two hooks reach that: one before a module to which x is an
argument keeps x, one after the module whose output is y returns G(x, y) − x instead. The model's own addition then
makes x + (G(x, y) − x): in a pre-norm model G(x, y) is the stream, in a post-norm model it is what the norm gets. A
rule that only scales y needs the second hook alone.

- Hooks are methods of modules that are children of the layer, see `container`. Names of the model's own parameters
  stay.
- A rule gets y as it is added, after dropout, in every architecture. Where the dropout comes after the hook because it
  is no module of its own (OPT, BART), the taps do it, from the same random numbers, and the layer's rate is 0 for so
  long: G(x, y) − x must not go through it.
- In a layer with parallel residual one gate serves both branches: the first hook holds its y back (returns zeros), the
  last returns G(x, sum of the y) − x.
- Norms come in where a conversion asks for them (see `norm`): one that is new on y, before the rule; or, in a pre-norm
  model that becomes a post-norm one, the branch's own norm on what the rule gives, so that G(x, y) is norm(rule(x, y)).
- x + (G − x) is rounded twice. It equals G bit for bit where G lies between x / 2 and 2 x, and where G = x + y and
  |y| ≤ |x|; else to about one unit in the last place of the larger of x and G. In bfloat16 this can be seen where a
  gate makes a large x small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_gradguard.patch.anatomy import Anatomy, Branch, Layer, pretrained, read_architecture
from hf_gradguard.patch.container import Container, alike, container_of, is_patched, remove_all
from hf_gradguard.patch.residual.rule import NormAdjusting, Rule

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


@dataclass(frozen=True, eq=False)
class TapNorms:
    """The norms that a conversion puts into a branch's tap."""

    output: nn.Module | None = None
    """A new one, for the branch's output y."""
    joined: nn.Module | None = None
    """One for what the rule makes of x and y."""
    is_new: bool = False
    """Whether `joined` is new; else it is the branch's own, which stays where it is in the layer."""


class Tap(nn.Module):
    """The hooks of one rule on the branches that meet x in one addition, and the rule.

    Args:
        passing: what all taps of the model have in common.
        rule: a gate, a scaling, or None for x + y.
        place: what it is in, for messages.
        argument: which argument of the module with the residual tap x is.
        dropout: rate of the dropout that the tap does in place of the layer.
        is_owner: whether the rule's parameters are stored here; False if another tap has the same rule.
        norms: what a conversion of norms does here.
    """

    def __init__(
        self,
        passing: _Passing,
        rule: nn.Module | None,
        place: str,
        argument: int | str,
        dropout: float,
        is_owner: bool,
        norms: TapNorms,
    ) -> None:
        super().__init__()
        self.passing = passing
        self.rule = rule if is_owner else None
        self.shared = () if is_owner or rule is None else (rule,)  # in a tuple it is no child, and stored only once
        self.norm = norms.output
        self.joined_norm = norms.joined if norms.is_new else None
        self.moved_norm = () if norms.is_new or norms.joined is None else (norms.joined,)
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
        rule: Any = self.active_rule
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
        if x is None:
            raise RuntimeError(
                f"{self.place}: the branch ended, but its residual was not seen in this forward pass. Another library "
                "may have replaced the module whose input it is, as PEFT does with modules_to_save; leave it out there"
            )
        y = y if held is None else y + held
        return _with_first(output, (self._joined(x, y) - x).to(torch.promote_types(x.dtype, y.dtype)))

    def _joined(self, x: Tensor, y: Tensor) -> Tensor:
        """G(x, y)."""
        rule: Any = self.active_rule
        if rule is None:
            joined = x + y
        elif is_scaling(rule):
            joined = x + rule.scale(y)
        else:
            joined = rule(x, y)
        if self.joined_norm is not None:
            return self.joined_norm(joined)  # type: ignore[no-any-return]
        for norm in self.moved_norm:
            joined = norm.forward(joined)  # called so, it is not switched off: its hooks see the model's own call alone
        return joined

    @property
    def active_rule(self) -> nn.Module | None:
        """The rule, wherever it is stored; None for x + y."""
        return self.shared[0] if self.shared else self.rule

    def _branch_output(self, output: Any) -> Tensor:
        y = output[0] if isinstance(output, tuple) else output
        y = F.dropout(y, self.dropout, self.training) if self.dropout else y
        return y if self.norm is None else self.norm(y)


Norms = Mapping[Branch, TapNorms]
"""What a conversion of norms does in the taps of each branch; nothing where a branch is not in it."""


class _LayerTaps:
    """Puts the taps into one layer, each named after the branches that it serves.

    Args:
        passing: what all taps of the model have in common.
        owned: rules that another tap has stored already.
        norms: see `Norms`.
    """

    def __init__(self, passing: _Passing, owned: set[nn.Module], norms: Norms) -> None:
        self.passing = passing
        self.owned = owned
        self.norms = norms

    def place(self, layer: Layer, rules: Sequence[_Assignment]) -> None:
        """Hangs the hooks of a layer's rules and norms."""
        container, rate = container_of(layer.module), 0.0
        if layer.dropout is not None:
            rate = getattr(layer.module, layer.dropout)
            container.set(layer.module, layer.dropout, 0.0)
        for branches, rule in rules:
            place, argument = ", ".join(map(str, branches)), branches[0].residual.argument
            norms = self.norms.get(branches[0], TapNorms())
            if len(branches) > 1 and norms.output is not None:
                raise ValueError(
                    f"{place}: each branch is to get a norm of its own, but {type(rule).__name__} is a gate that takes "
                    "the sum of both (parallel residual); use a multiplier, or a norm that adds none"
                )
            tap = Tap(self.passing, rule, place, argument, rate, rule not in self.owned, norms)
            alike(tap, branches[0].output.weight)
            if rule is not None:
                self.owned.add(rule)
            if isinstance(rule, NormAdjusting):
                norm = branches[0].norm.value
                for name, value in rule.norm_settings(norm).items():
                    container.set(norm, name, value)
            container.add_module("_".join(branch.kind for branch in branches), tap)
            _hook(container, layer, tap, branches)
        container.train(layer.module.training)

    def are_needed(self, rules: Sequence[_Assignment]) -> bool:
        """Whether there is anything to do in a layer."""
        return any(rule is not None or branch in self.norms for branches, rule in rules for branch in branches)


def _hook(container: Container, layer: Layer, tap: Tap, branches: Sequence[Branch]) -> None:
    first, last = branches[0], branches[-1]
    if not (_is_gate(tap.active_rule) or tap.joined_norm is not None or tap.moved_norm):
        container.after(layer.module, first.entry.end, tap.scale)
        return
    container.before(layer.module, first.entry.residual.module, tap.see)
    for branch in branches[:-1]:
        container.after(layer.module, branch.entry.end, tap.hold)
    container.after(layer.module, last.entry.end, tap.join)


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
    refuse_patched(anatomy.model)
    attach_to(anatomy, make_rule)
    return anatomy


def attach_to(anatomy: Anatomy, make_rule: MakeRule, norms: Norms | None = None) -> None:
    """As `attach`, for a model whose anatomy is read, together with a conversion of its norms.

    Args:
        anatomy: the model's, as it will be with those norms.
        make_rule: see `attach`.
        norms: what the conversion does in the taps.
    """
    assignments = [_assign(layer, make_rule) for layer in anatomy.layers]
    taps = _LayerTaps(_Passing(), set(), norms or {})
    for layer, rules in zip(anatomy.layers, assignments, strict=True):
        if taps.are_needed(rules):
            taps.place(layer, rules)


def refuse_patched(model: nn.Module) -> None:
    """Raises ValueError for a model that is patched."""
    if is_patched(model):
        raise ValueError(f"this {type(model).__name__} is patched already; take the patch away first (unpatch_model)")


def detach(model: nn.Module) -> None:
    """Takes all taps and rules out of a model; what its outputs were before, they are again, bit for bit.

    Raises:
        ValueError: there are none.
    """
    inner = pretrained(model)
    if not is_patched(inner):
        raise ValueError(f"this {type(inner).__name__} is not patched")
    remove_all(inner)


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
    if not isinstance(rule, nn.Module) or not (is_scaling(rule) or _has_forward(rule)):
        raise TypeError(
            f"{branch}: {type(rule).__name__} is no residual rule; return an nn.Module with forward(x, y) or scale(y), "
            "or None"
        )
    return rule


def _has_forward(rule: nn.Module) -> bool:
    return type(rule).forward is not nn.Module.forward


def _is_gate(rule: nn.Module | None) -> bool:
    return rule is not None and not is_scaling(rule)


def is_scaling(rule: nn.Module) -> bool:
    """Whether a rule has `scale(y)`, and is no gate."""
    # asked of the class, as a gate may have a parameter of that name
    return callable(getattr(type(rule), "scale", None))


def _with_first(output: Any, first: Tensor) -> Any:
    """A module's output with another first tensor."""
    return (first, *output[1:]) if isinstance(output, tuple) else first
