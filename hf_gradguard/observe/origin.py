"""Where a NaN or an infinity was born: one micro-batch is run again, with every module and every gradient watched.

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
import json
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node

from hf_gradguard.backends.dtensor import local_part
from hf_gradguard.observe.forward_order import TRANSPARENT
from hf_gradguard.observe.random_state import RandomState
from hf_gradguard.observe.structure import unwrapped_root

Direction = Literal["forward", "backward"]

_DESCRIBED = 4
"""So many tensors of one call are described in a message."""
_IGNORED_LABEL = -100


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch, kept by reference, so that it can be run again."""

    run: Callable[[], object]
    """Its forward and backward pass, exactly as training ran it; returns the loss, or anything."""
    inputs: Mapping[str, Any]
    """What the model was given."""
    random_state: RandomState
    """As it was before the forward pass."""


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


def trace(model: nn.Module, micro_batch: MicroBatch) -> Origin:
    """Runs a micro-batch once more and finds which module first made something non-finite.

    Gradients, buffers, random state and training flags are afterwards as they were, and no hook is left, also where
    the replay fails. Compiled code runs uncompiled. In a distributed run the replay communicates like the backward
    pass that it repeats, so every process has to call it. An engine that steps the optimizer within the backward pass
    (DeepSpeed, LOMO) would make an update: don't replay there.

    Args:
        model: wrapped or not.
        micro_batch: what to run. A `run` without a backward pass is traced as far as it goes.

    Returns:
        The origin, or one without a direction, whose message says that nothing bad was found or why the replay failed.
        No exception of it gets out.
    """
    try:
        root = unwrapped_root(model)
        with _unchanged(root, micro_batch), _uncompiled(), torch.enable_grad(), _Tracer(root) as tracer:
            micro_batch.random_state.restore()
            result = micro_batch.run()
            return tracer.origin(result)
    except Exception as error:  # it is a diagnosis: whatever it meets, the training goes on
        return Origin(None, None, f"the replay of the micro-batch failed with {type(error).__name__}: {error}")


def save(micro_batch: MicroBatch, path: str | Path) -> None:
    """Writes the inputs of a micro-batch as a safetensors file.

    Tensors have dotted names where the inputs are nested (`past.0.key`). What is no tensor is a JSON object, by the
    same names, under `inputs` in the file's metadata.

    Args:
        micro_batch: its inputs only are written.
        path: of the file; its directory is made.

    Raises:
        OSError: it can't be written. That is for the caller to handle.
    """
    from safetensors.torch import save as serialized

    leaves = list(_leaves(micro_batch.inputs))
    # Copies, as labels are often the very tensor of the inputs, and the format knows no tensors that share memory.
    tensors = {
        name: local_part(leaf.detach()).to("cpu", copy=True).contiguous()
        for name, leaf in leaves
        if isinstance(leaf, Tensor)
    }
    rest = {name: leaf for name, leaf in leaves if not isinstance(leaf, Tensor)}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(serialized(tensors, {"inputs": json.dumps(rest, default=_as_json)}))


def _as_json(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else repr(value)


# Leaving everything as it was


@contextmanager
def _unchanged(root: nn.Module, micro_batch: MicroBatch) -> Iterator[None]:
    """Puts gradients, buffers, training flags and random state back at the end, whatever happens."""
    inputs = [leaf for _, leaf in _leaves(micro_batch.inputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    with ExitStack() as stack:
        stack.callback(RandomState.capture().restore)
        for module in root.modules():
            stack.callback(setattr, module, "training", module.training)
            buffers = module.named_buffers(recurse=False, remove_duplicate=False)
            for name, buffer in ((name, buffer) for name, buffer in buffers if not buffer.is_meta):
                stack.callback(_put_back, module, name, buffer, buffer.detach().clone())
        for leaf in (*root.parameters(), *(tensor for tensor in inputs if tensor.is_leaf)):
            # DDP may keep its gradients in buffers of its own, which the replay writes to as well.
            copy = leaf.grad.detach().clone() if leaf.grad is not None and _is_distributed() else None
            stack.callback(_put_back, leaf, "grad", leaf.grad, copy)
            leaf.grad = None
        yield


@torch.no_grad()
def _put_back(owner: Any, name: str, tensor: Tensor | None, values: Tensor | None) -> None:
    setattr(owner, name, tensor)
    # Only what has changed: some buffers are expanded, and can't be written to.
    if tensor is not None and values is not None and not torch.equal(local_part(tensor), local_part(values)):
        local_part(tensor).copy_(local_part(values))


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _uncompiled() -> AbstractContextManager[Any]:
    """Compiled code runs no hook that was added later."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to import it takes seconds
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


# What a tensor holds


@dataclass(frozen=True)
class _Range:
    """The values of one tensor, in numbers for a message."""

    name: str
    kind: str
    """Its dtype and shape."""
    low: float
    high: float
    """Smallest and largest finite element; NaN where there is none."""
    size: int
    nan: int = 0
    infinite: int = 0
    minus_infinite: int = 0
    """How many of the infinite ones are negative."""

    @property
    def is_finite(self) -> bool:
        return not self.nan and not self.infinite

    @property
    def is_like_mask(self) -> bool:
        """Whether −infinity is the only non-finite value."""
        return not self.nan and 0 < self.infinite == self.minus_infinite

    def __str__(self) -> str:
        name = f"{self.name} " if self.name else ""
        counts = ((self.nan, "NaN"), (self.infinite, "infinite"))
        bad = [f"{count} of {self.size} elements {what}" for count, what in counts if count]
        parts = [] if math.isnan(self.low) else [f"between {self.low:.3g} and {self.high:.3g}"]
        return f"{name}{' with '.join([*parts, ' and '.join(bad)] if bad else parts)} ({self.kind})"


def _measure(name: str, tensor: Tensor) -> _Range | None:
    """The range of a tensor; None for what has none: empty, boolean, on no device, of a kind without order."""
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    try:
        values = _plain(tensor)
        if values.numel() == 0 or values.dtype == torch.bool or values.is_meta:
            return None
        low, high = torch.stack(torch.aminmax(values)).tolist()
        if math.isfinite(low) and math.isfinite(high):
            return _Range(name, kind, low, high, values.numel())
        counts = torch.stack([values.isnan().sum(), values.isinf().sum(), values.isneginf().sum()]).tolist()
        finite = values[values.isfinite()]
        low, high = torch.stack(torch.aminmax(finite)).tolist() if finite.numel() else (math.nan, math.nan)
    except (NotImplementedError, RuntimeError, TypeError):
        return None
    return _Range(name, kind, low, high, values.numel(), *counts)


def _plain(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in a form that can be compared."""
    values = local_part(tensor.detach())
    if values.layout != torch.strided:
        values = values.coalesce().values() if values.layout == torch.sparse_coo else values.values()
    if values.is_complex():
        return torch.view_as_real(values)
    return values.float() if values.is_floating_point() and values.itemsize == 1 else values


def _what(ranges: Iterable[_Range]) -> str:
    """What of the non-finite is among them."""
    ranges = list(ranges)
    kinds = (("NaN", any(one.nan for one in ranges)), ("infinity", any(one.infinite for one in ranges)))
    return " and ".join(name for name, is_there in kinds if is_there)


def _listed(ranges: Sequence[_Range]) -> str:
    if len(ranges) == 1:
        return str(replace(ranges[0], name=""))
    more = f" and {len(ranges) - _DESCRIBED} more" if len(ranges) > _DESCRIBED else ""
    return ", ".join(map(str, ranges[:_DESCRIBED])) + more


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What a nested argument or output consists of, with dotted names."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif is_dataclass(value) and not isinstance(value, type):
        items = [(part.name, getattr(value, part.name)) for part in fields(value)]
    else:
        yield name, value
        return
    for key, item in items:
        yield from _leaves(item, f"{name}.{key}" if name else str(key))


Measured = list[tuple[Tensor, _Range]]


def _measured(value: Any) -> Measured:
    """All that can be measured of a nested argument or output."""
    tensors = [(name, leaf) for name, leaf in _leaves(value) if isinstance(leaf, Tensor)]
    pairs = [(tensor, _measure(name, tensor)) for name, tensor in tensors]
    return [(tensor, found) for tensor, found in pairs if found is not None]


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


# Watching


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
    inputs: list[_Range]
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
        return f"inputs {_listed(self.inputs)}" if self.inputs else "no tensor"


@dataclass(frozen=True)
class _Place:
    """Which code made a node of the graph."""

    call: _Call | None
    own_code: str


class _Tracer:
    """Hooks on all modules of a model and on all nodes of the graph that they make, for as long as it is entered."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._names = {module: _clean(name) for name, module in root.named_modules()}
        self._parameters = {parameter: _clean(name) for name, parameter in root.named_parameters()}
        self._hooks = ExitStack()
        self._stack: list[_Call] = []
        self._calls: dict[str, _Call] = {}
        self._births: list[_Birth] = []
        self._outputs: list[_Range] = []
        self._loss: list[_Range] = []
        self._in_backward = False
        self._places: dict[Node, _Place] = {}
        self._reached: set[Node] = set()
        self._blame: dict[Node, int] = {}
        self._gradient_births: list[_Birth] = []
        self._culprits: list[int] = []
        self._hit_parameter = False
        self._saw_gradient = False

    def __enter__(self) -> _Tracer:
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
        returned = [found for _, found in _measured(result)]
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

    def _origin_of_loss(self, forward: _Birth | None, returned: Sequence[_Range]) -> Origin:
        outputs_are_bad = any(not found.is_finite for found in (*self._outputs, *self._loss))
        if forward is not None and outputs_are_bad:
            return forward.origin
        message = (
            f"the loss became {_what(returned)} in the forward pass, outside of the model, whose outputs are finite: "
            f"{_listed(self._outputs)}"
        )
        return Origin("forward", None, message)

    def _origin_of_gradient(self) -> tuple[Origin, _Call | None] | None:
        ranges = [
            (name, _measure("", weight.grad)) for weight, name in self._parameters.items() if weight.grad is not None
        ]
        bad = [(name, found) for name, found in ranges if found is not None and not found.is_finite]
        if not bad and not self._hit_parameter:
            return None
        if self._culprits:
            birth = self._gradient_births[min(self._culprits)]
            return birth.origin, birth.call
        name, found = bad[-1]
        message = (
            f"the gradient of {name} holds {_what([found])} after the backward pass, though no module's backward pass "
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
        inputs = _measured(given)
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
            self._look_at_outputs(call, _measured(output))
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
                given = f"{call.who} was given {_what(ranges)}: {', '.join(map(str, ranges))}"
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

    def _made_by(self, call: _Call, bad: Sequence[_Range], before: str | None = None) -> _Birth:
        """A birth in the code of a module itself.

        Args:
            call: of the module.
            bad: what it made.
            before: the submodule that was given it; None where the module returned it.
        """
        birth = partial(_Birth, call=call)
        produced = f"{call.who} produced {_what(bad)} in the forward pass{call.own_code(before)}"
        weights = call.module.named_parameters(recurse=call.last_child is None and before is None)
        ranges = (_measure(name, weight) for name, weight in weights)
        weight = next((found for found in ranges if found is not None and not found.is_finite), None)
        if weight is not None:
            return birth(
                Origin("forward", call.name, f"{produced}, as its parameter {weight.name} is {_listed([weight])}")
            )
        if call.parent is None and before is None and all(map(_is_loss, bad)):
            return birth(Origin("forward", call.name, self._bad_loss(call, bad)))
        made = f" ({', '.join(map(str, bad))})" if call.own_code(before) else ""
        return birth(Origin("forward", call.name, f"{produced}{made} from {call.given()}"))

    def _bad_loss(self, call: _Call, bad: Sequence[_Range]) -> str:
        labels = [found for found in call.inputs if found.name.rpartition(".")[2] == "labels"]
        reason = ""
        if any(found.high == found.low == _IGNORED_LABEL for found in labels):
            reason = f": every label is {_IGNORED_LABEL}, so there is nothing to take the mean of"
        return (
            f"the loss of {call.who} became {_what(bad)} in the forward pass, though what its modules gave is "
            f"finite{reason}; {call.who} was given {call.given()}"
        )

    # The backward pass

    def _claim(self, value: Any, place: _Place) -> None:
        """Gives all nodes of the graph that led to these tensors, and that nobody has claimed, to a place in the code.

        A call's own nodes are those that its submodules have left.
        """
        todo = [leaf.grad_fn for _, leaf in _leaves(value) if isinstance(leaf, Tensor)]
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

    def _given(self, node: Node, bad: Sequence[_Range], given: Sequence[Tensor | None]) -> _Birth:
        """The birth in the operation of a node."""
        place = self._places[node]
        ranges = [found for _, found in _measured([gradient for gradient in given if gradient is not None])]
        who = "code outside of the model" if place.call is None else place.call.who
        message = (
            f"{who} produced {_what(bad)} in the backward pass{place.own_code} (in {node.name()}) from the gradient "
            f"{_listed(ranges)}"
        )
        if place.call is not None:
            message += f"; in the forward pass it was given {place.call.given()}"
        return _Birth(Origin("backward", None if place.call is None else place.call.name, message), place.call)

    def _arrived(self, node: Node, bad: Sequence[_Range]) -> _Birth:
        """The birth of a bad gradient that comes from none of the nodes that are watched."""
        call, leaf = self._places[node].call, _leaf_of(node)
        name = self._parameters.get(leaf) if isinstance(leaf, nn.Parameter) else None
        what, is_sum = _what(bad), node in self._reached
        where = "where gradients are added up, or in a hook of it" if is_sum else "outside of the model's modules"
        if name is not None:
            message = f"the gradient of {name} became {what} in the backward pass {where}: {_listed(bad)}"
            return _Birth(Origin("backward", name.rpartition(".")[0], message), call)
        if call is not None and is_sum:
            message = f"{call.who} produced {what} in the backward pass, in the gradient of its output, {where}"
            return _Birth(Origin("backward", call.name, f"{message}: {_listed(bad)}"), call)
        if call is None or call.parent is None or not call.is_second:  # all that leads to the outputs is watched
            message = (
                f"the gradient that the model was given in the backward pass was {what} already: the loss, outside of "
                f"the model, produced it: {_listed(bad)}"
            )
            return _Birth(Origin("backward", None, message), None)
        layer = replace(call.parent, last_child=call.name)
        message = f"{layer.who} produced {what} in the backward pass{layer.own_code()}: {_listed(bad)}"
        return _Birth(Origin("backward", layer.name, message), layer)


def _clean(name: str) -> str:
    """A name without what wrappers have added to it."""
    return ".".join(part for part in name.split(".") if part not in TRANSPARENT)


def _is_mask(tensor: Tensor, found: _Range, parent: _Call | None) -> bool:
    """Whether an argument is as a mask is: it holds −infinity, and no gradient goes through it."""
    if not found.is_like_mask:
        return False
    return "mask" in found.name if parent is None else not tensor.requires_grad


def _is_loss(found: _Range) -> bool:
    """Whether an output of the model is the loss: by its name, or the scalar in front of a tuple."""
    return found.name == "loss" or (found.name in ("", "0") and found.kind.endswith("[]"))


def _bad_gradients(gradients: Iterable[Tensor | None]) -> list[_Range]:
    found = [_measure("", gradient) for gradient in gradients if gradient is not None]
    return [one for one in found if one is not None and not one.is_finite]


def _leaf_of(node: Node) -> Tensor | None:
    """The tensor in whose `.grad` a node adds up, if it is such a node."""
    variable: Tensor | None = getattr(node, "variable", None)
    return variable
