"""Watching one forward and backward pass: every module, and every node of autograd's graph.

The forward pass is watched at the modules: the first in time that gives something non-finite, though it was given
nothing of the kind, made it. The backward pass is watched at the nodes of autograd's graph, each of which belongs to
the module whose call made it. So the sum of gradients in a residual stream does not hide which branch the bad one came
from, and tensors need neither copies nor views, which code that works in place would not bear.

Not everything that is non-finite is a fault: masks hold −infinity, and some models clamp what overflowed. What a later
module turns into something finite again is blamed only where there is nothing else to blame. Likewise a bad gradient
counts only where it has reached a parameter.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.autograd.graph import Node

from hf_gradguard.observe.forward_order import TRANSPARENT
from hf_gradguard.observe.ranges import Measured, Range, faults, leaves, listed, measure, measured

Direction = Literal["forward", "backward"]

_IGNORED_LABEL = -100


@dataclass(frozen=True)
class Origin:
    """What a replay found."""

    direction: Direction | None
    """The pass in which the fault came; None if it did not come again."""
    module: str | None
    """Its name in `model.named_modules()`, without what DDP and `torch.compile` put around the model; "" is the model
    itself. None if the fault did not come again, or came from code outside of the model, as a loss of one's own."""
    message: str
    """A sentence that names the module, and what it made of which inputs."""


@dataclass(eq=False)
class _Birth:
    """A place where something non-finite came from something finite."""

    origin: Origin
    call: _Call | None
    """In which it happened; None outside of the model."""
    is_like_mask: bool = False
    """Whether it made nothing but −infinity."""
    tensors: list[weakref.ref[Tensor]] = field(default_factory=list)
    """What it made, or what it was first seen in."""
    has_spread: bool = False
    """Whether a module that was given nothing else bad made something bad of it, with no birth of its own."""
    is_absorbed: bool = False
    """Whether what was made of it is finite again."""

    def made(self, tensor: Tensor) -> bool:
        return any(ref() is tensor for ref in self.tensors)

    @property
    def doubt(self) -> tuple[bool, bool]:
        """The less, the likelier it is the fault."""
        return self.is_absorbed, self.is_like_mask and not self.has_spread


@dataclass(eq=False)
class _Call:
    """One call of a module."""

    module: nn.Module
    name: str
    parent: _Call | None
    inputs: list[Range]
    births_before: int
    is_second: bool
    """Whether it was made in the backward pass, for a layer that is checkpointed."""
    last_child: str | None = None
    sources: set[_Birth] = field(default_factory=set)
    """Of what is bad among all that its code has at hand."""
    known: set[_Birth] = field(default_factory=set)
    """Births whose own tensors it was given, if it was given nothing else that is bad."""
    is_bad: bool = False
    """Whether it took in or gave out something non-finite that is not only a mask."""

    @property
    def who(self) -> str:
        return self.name or "the model"

    def live_sources(self) -> set[_Birth]:
        return {birth for birth in self.sources if not birth.is_absorbed}

    def own_code(self, before: str | None = None) -> str:
        """Which part of its own code is running, in words; nothing where it has called no submodule."""

        def short(name: str) -> str:
            return name.removeprefix(f"{self.name}.")

        if self.last_child is None:
            return "" if before is None else f" in its own code before its submodule {short(before)}"
        if before is None:
            return f" in its own code after its submodule {short(self.last_child)}"
        return f" in its own code between its submodules {short(self.last_child)} and {short(before)}"

    def given(self) -> str:
        return f"inputs {listed(self.inputs)}" if self.inputs else "no tensor"


@dataclass(frozen=True)
class _Place:
    """Which code made a node of the graph."""

    call: _Call | None
    own_code: str


class Tracer:
    """Hooks on all modules of a model and on all nodes of the graph that they make, for as long as it is entered."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._names = {module: _clean(name) for name, module in root.named_modules()}
        self._parameters = {parameter: _clean(name) for name, parameter in root.named_parameters()}
        self._hooks = ExitStack()
        self._stack: list[_Call] = []
        self._calls: dict[str, _Call] = {}
        self._births: list[_Birth] = []
        self._outputs: list[Range] = []
        self._loss: list[Range] = []
        self._in_backward = False
        self._places: dict[Node, _Place] = {}
        self._reached: set[Node] = set()
        self._blame: dict[Node, int] = {}
        self._gradient_births: list[_Birth] = []
        self._culprits: list[int] = []
        self._hit_parameter = False
        self._saw_gradient = False

    def __enter__(self) -> Tracer:
        try:
            for module in self._names:
                enter = module.register_forward_pre_hook(self._enter, with_kwargs=True)
                self._hooks.callback(enter.remove)
                # Always, as checkpointing ends the second forward pass of a layer by an exception.
                leave = module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
                self._hooks.callback(leave.remove)
        except BaseException:
            self._hooks.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    # The verdict

    def origin(self, result: object) -> Origin:
        """What was found, once the micro-batch has run.

        Args:
            result: what it returned: the loss, or anything.
        """
        forward = min(self._births, key=lambda birth: birth.doubt, default=None)
        returned = [found for _, found in measured(result)]
        losses = [*returned, *self._loss]
        if not self._calls:
            return Origin(None, None, "the replay of the micro-batch called no module of the model: nothing was seen")
        if any(not loss.is_finite for loss in losses):
            return self._origin_of_loss(forward, returned)
        found = self._origin_of_gradient()
        if forward is not None and not any(forward.doubt) and (found is not None or not self._saw_gradient):
            return forward.origin
        if found is not None:
            origin, call = found
            return forward.origin if forward is not None and call is not None and call.is_bad else origin
        if not self._saw_gradient:
            message = (
                "the same micro-batch, run again, was finite in the forward pass; its backward pass is not part of "
                "what can be run again"
            )
            return Origin(None, None, message)
        message = (
            "the same micro-batch, run again, gave finite gradients: the fault was transient (hardware, a race, or "
            "code that changed the gradient after the backward pass)"
        )
        return Origin(None, None, message)

    def _origin_of_loss(self, forward: _Birth | None, returned: Sequence[Range]) -> Origin:
        outputs_are_bad = any(not found.is_finite for found in (*self._outputs, *self._loss))
        if forward is not None and outputs_are_bad:
            return forward.origin
        message = (
            f"the loss became {faults(returned)} in the forward pass, outside of the model, whose outputs are finite: "
            f"{listed(self._outputs)}"
        )
        return Origin("forward", None, message)

    def _origin_of_gradient(self) -> tuple[Origin, _Call | None] | None:
        ranges = [
            (name, measure("", weight.grad)) for weight, name in self._parameters.items() if weight.grad is not None
        ]
        bad = [(name, found) for name, found in ranges if found is not None and not found.is_finite]
        if not bad and not self._hit_parameter:
            return None
        if self._culprits:
            birth = self._gradient_births[min(self._culprits)]
            return birth.origin, birth.call
        name, found = bad[-1]
        message = (
            f"the gradient of {name} holds {faults([found])} after the backward pass, though no module's backward pass "
            f"made any (a hook of the parameter, code outside of the modules or another process did): {found}"
        )
        return Origin("backward", name.rpartition(".")[0], message), None

    # The forward pass

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self._names[module]
        if module is self._root and not self._stack:
            self._in_backward = False
        given = _arguments(module, args, kwargs)
        parent = self._stack[-1] if self._stack else self._nearest_call(name) if self._in_backward else None
        inputs = measured(given)
        call = _Call(module, name, parent, [found for _, found in inputs], len(self._births), self._in_backward)
        self._stack.append(call)
        self._calls[name] = call
        self._claim(given, _Place(parent, "" if parent is None else parent.own_code(before=name)))
        if not self._in_backward:
            self._look_at_inputs(call, inputs)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._stack or self._stack[-1].module is not module:
            return
        call = self._stack.pop()
        self._claim(output, _Place(call, call.own_code()))
        if not self._in_backward:
            self._look_at_outputs(call, measured(output))
        if call.parent is not None:
            call.parent.last_child = call.name

    def _nearest_call(self, name: str) -> _Call | None:
        """Of the module that surrounds a call in the second forward pass of a checkpointed layer, whose own call is
        long over."""
        while name:
            name = name.rpartition(".")[0]
            if name in self._calls:
                return replace(self._calls[name], last_child=None)
        return None

    def _look_at_inputs(self, call: _Call, inputs: Measured) -> None:
        parent = call.parent
        sources = set() if parent is None else parent.live_sources()
        bad = [(tensor, found) for tensor, found in inputs if not found.is_finite]
        known = {birth for birth in self._births if any(birth.made(tensor) for tensor, _ in bad)}
        if not known and not sources:  # so it can't stem from what a module has made
            bad = [(tensor, found) for tensor, found in bad if not _is_mask(tensor, found, parent)]
        if not bad:
            return
        for birth in known:
            birth.is_absorbed = False
        if all(any(birth.made(tensor) for birth in known) for tensor, _ in bad):
            call.known = known
        call.sources = set(known) or sources
        call.is_bad = not all(found.is_like_mask for _, found in bad)
        if not call.sources:
            ranges = [found for _, found in bad]
            if parent is None:
                given = f"{call.who} was given {faults(ranges)}: {', '.join(map(str, ranges))}"
                source = "it came with the data, or from code before the model"
                birth = _Birth(Origin("forward", call.name, f"{given}; {source}"), call)
            else:
                birth = self._made_by(parent, ranges, before=call.name)
            call.known = {birth}
            self._add(birth, bad, call)

    def _look_at_outputs(self, call: _Call, outputs: Measured) -> None:
        bad = [(tensor, found) for tensor, found in outputs if not found.is_finite]
        inside = [birth for birth in self._births[call.births_before :] if not birth.is_absorbed]
        if bad:
            if not inside and not call.live_sources():
                birth = self._made_by(call, [found for _, found in bad])
                self._add(birth, bad, call)
            for birth in call.known:
                birth.has_spread |= not inside
            call.is_bad = True
            if call.parent is not None:
                call.parent.sources |= call.live_sources().union(inside)
        elif any(tensor.is_floating_point() for tensor, _ in outputs):
            for birth in (*inside, *(birth for birth in call.known if not birth.has_spread)):
                birth.is_absorbed = True
        if call.parent is None:
            for _, found in outputs:
                (self._loss if _is_loss(found) else self._outputs).append(found)

    def _add(self, birth: _Birth, bad: Measured, call: _Call) -> None:
        birth.tensors = [weakref.ref(tensor) for tensor, _ in bad]
        birth.is_like_mask = all(found.is_like_mask for _, found in bad)
        self._births.append(birth)
        call.sources.add(birth)

    def _made_by(self, call: _Call, bad: Sequence[Range], before: str | None = None) -> _Birth:
        """A birth in the code of a module itself.

        Args:
            call: of the module.
            bad: what it made.
            before: the submodule that was given it; None where the module returned it.
        """
        birth = partial(_Birth, call=call)
        produced = f"{call.who} produced {faults(bad)} in the forward pass{call.own_code(before)}"
        weights = call.module.named_parameters(recurse=call.last_child is None and before is None)
        ranges = (measure(name, weight) for name, weight in weights)
        weight = next((found for found in ranges if found is not None and not found.is_finite), None)
        if weight is not None:
            return birth(
                Origin("forward", call.name, f"{produced}, as its parameter {weight.name} is {listed([weight])}")
            )
        if call.parent is None and before is None and all(map(_is_loss, bad)):
            return birth(Origin("forward", call.name, self._bad_loss(call, bad)))
        made = f" ({', '.join(map(str, bad))})" if call.own_code(before) else ""
        return birth(Origin("forward", call.name, f"{produced}{made} from {call.given()}"))

    def _bad_loss(self, call: _Call, bad: Sequence[Range]) -> str:
        labels = [found for found in call.inputs if found.name.rpartition(".")[2] == "labels"]
        reason = ""
        if any(found.high == found.low == _IGNORED_LABEL for found in labels):
            reason = f": every label is {_IGNORED_LABEL}, so there is nothing to take the mean of"
        return (
            f"the loss of {call.who} became {faults(bad)} in the forward pass, though what its modules gave is "
            f"finite{reason}; {call.who} was given {call.given()}"
        )

    # The backward pass

    def _claim(self, value: Any, place: _Place) -> None:
        """Gives all nodes of the graph that led to these tensors, and that nobody has claimed, to a place in the code.

        A call's own nodes are those that its submodules have left.
        """
        todo = [leaf.grad_fn for _, leaf in leaves(value) if isinstance(leaf, Tensor)]
        while todo:
            node = todo.pop()
            if node is None or node in self._places:
                continue
            self._places[node] = place
            self._hooks.callback(node.register_prehook(partial(self._arrives, node)).remove)
            self._hooks.callback(node.register_hook(partial(self._gives, node)).remove)
            todo += [following for following, _ in node.next_functions]

    def _arrives(self, node: Node, gradients: Sequence[Tensor | None]) -> None:
        self._in_backward = self._saw_gradient = True
        bad, leaf = _bad_gradients(gradients), _leaf_of(node)
        if not bad:
            return
        if node not in self._blame:
            if leaf is not None and not isinstance(leaf, nn.Parameter):
                return  # the input of a checkpointed layer: what the layer gives back will be seen there
            self._blame[node] = self._new_gradient_birth(self._arrived(node, bad))
        if leaf is not None:
            self._culprits.append(self._blame[node])
            self._hit_parameter |= isinstance(leaf, nn.Parameter)

    def _gives(self, node: Node, made: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
        blame = self._blame.get(node)
        for (following, _), gradient in zip(node.next_functions, made, strict=False):
            if following is None or gradient is None:
                continue
            self._reached.add(following)
            bad = _bad_gradients([gradient])
            if not bad:
                continue
            if blame is None:
                blame = self._new_gradient_birth(self._given(node, bad, given))
            self._blame[following] = min(blame, self._blame.get(following, blame))

    def _new_gradient_birth(self, birth: _Birth) -> int:
        self._gradient_births.append(birth)
        return len(self._gradient_births) - 1

    def _given(self, node: Node, bad: Sequence[Range], given: Sequence[Tensor | None]) -> _Birth:
        """The birth in the operation of a node."""
        place = self._places[node]
        ranges = [found for _, found in measured([gradient for gradient in given if gradient is not None])]
        who = "code outside of the model" if place.call is None else place.call.who
        message = (
            f"{who} produced {faults(bad)} in the backward pass{place.own_code} (in {node.name()}) from the gradient "
            f"{listed(ranges)}"
        )
        if place.call is not None:
            message += f"; in the forward pass it was given {place.call.given()}"
        return _Birth(Origin("backward", None if place.call is None else place.call.name, message), place.call)

    def _arrived(self, node: Node, bad: Sequence[Range]) -> _Birth:
        """The birth of a bad gradient that comes from none of the nodes that are watched."""
        call, leaf = self._places[node].call, _leaf_of(node)
        name = self._parameters.get(leaf) if isinstance(leaf, nn.Parameter) else None
        kinds, is_sum = faults(bad), node in self._reached
        where = "where gradients are added up, or in a hook of it" if is_sum else "outside of the model's modules"
        if name is not None:
            message = f"the gradient of {name} became {kinds} in the backward pass {where}: {listed(bad)}"
            return _Birth(Origin("backward", name.rpartition(".")[0], message), call)
        if call is not None and is_sum:
            message = f"{call.who} produced {kinds} in the backward pass, in the gradient of its output, {where}"
            return _Birth(Origin("backward", call.name, f"{message}: {listed(bad)}"), call)
        if call is None or call.parent is None or not call.is_second:  # all that leads to the outputs is watched
            message = (
                f"the gradient that the model was given in the backward pass was {kinds} already: the loss, outside of "
                f"the model, produced it: {listed(bad)}"
            )
            return _Birth(Origin("backward", None, message), None)
        layer = replace(call.parent, last_child=call.name)
        message = f"{layer.who} produced {kinds} in the backward pass{layer.own_code()}: {listed(bad)}"
        return _Birth(Origin("backward", layer.name, message), layer)


def _clean(name: str) -> str:
    """A name without what wrappers have added to it."""
    return ".".join(part for part in name.split(".") if part not in TRANSPARENT)


def _is_mask(tensor: Tensor, found: Range, parent: _Call | None) -> bool:
    """Whether an argument is as a mask is: it holds −infinity, and no gradient goes through it."""
    if not found.is_like_mask:
        return False
    return "mask" in found.name if parent is None else not tensor.requires_grad


def _is_loss(found: Range) -> bool:
    """Whether an output of the model is the loss: by its name, or the scalar in front of a tuple."""
    return found.name == "loss" or (found.name in ("", "0") and found.kind.endswith("[]"))


def _bad_gradients(gradients: Iterable[Tensor | None]) -> list[Range]:
    found = [measure("", gradient) for gradient in gradients if gradient is not None]
    return [one for one in found if one is not None and not one.is_finite]


def _leaf_of(node: Node) -> Tensor | None:
    """The tensor in whose `.grad` a node adds up, if it is such a node."""
    variable: Tensor | None = getattr(node, "variable", None)
    return variable


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names that the module's `forward` gives them."""
    try:
        signature = inspect.signature(module.forward)
        given = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return {**{str(index): value for index, value in enumerate(args)}, **kwargs}
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    return given
