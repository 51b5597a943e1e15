"""What is said of each thing that was done: the events of the policies."""

from __future__ import annotations

from hf_gradguard.act.accumulation import Taken
from hf_gradguard.act.clipping import Outcome
from hf_gradguard.act.nonfinite import Decision
from hf_gradguard.events import Event
from hf_gradguard.observe.fault import Fault
from hf_gradguard.observe.layout import Layout


def nonfinite(step: int, fault: Fault, decision: Decision, held: int, *, dry_run: bool) -> Event:
    """A window with a gradient that is not finite, while so many are held back."""
    kind = "NaN" if fault.value != fault.value else "infinity"
    others = f" and of {fault.others} more parameters" if fault.others else ""
    where = f" after micro-batch {fault.micro_batch}" if fault.micro_batch else ""
    if dry_run:
        done = f"the update goes ahead, as dry_run asks; the policy would {decision}"
    elif decision == "observe":
        done = "the update goes ahead, as nonfinite='observe' asks"
    elif held:
        done = f"the window is left out, the {held} held before it stay"
    else:
        done = "the update was skipped, the weights are as before"
    origin = "" if fault.origin is None else f". Run again: {fault.origin.message}"
    return Event(
        kind="nonfinite",
        step=step,
        parameter=fault.parameter,
        layer=fault.layer,
        micro_batch=fault.micro_batch,
        value=fault.value,
        action=_action(decision, dry_run),
        message=f"the gradient of {fault.parameter}{others} holds {kind}{where}; {done}{origin}",
    )


def stopped(step: int, policy: str) -> Event:
    """Training ends by a policy's decision."""
    message = f"training ends here, as nonfinite={policy!r} asks"
    return Event("stopped", step, action="stop", message=message)


def deferred(step: int, taken: Taken, *, dry_run: bool) -> Event:
    """A window that was held back."""
    return Event(
        kind="deferred",
        step=step,
        value=taken.value,
        threshold=taken.threshold,
        action=_action("hold", dry_run),
        message="the window would be held back" if dry_run else "the window is held back",
    )


def discarded(step: int, windows: int) -> Event:
    """Windows that were held back when training ended."""
    message = f"training ended with the gradients of {windows} windows held back: they are discarded"
    return Event("discarded", step, value=float(windows), action="discard", message=message)


def clipped(step: int, outcome: Outcome, layout: Layout, *, dry_run: bool) -> Event:
    """A gradient that was clipped by a rule of ours."""
    parameter = None if outcome.parameter is None else layout.parameters[outcome.parameter]
    group = outcome.group if parameter is None else parameter.group
    layer = None if group is None else layout.groups[group].name
    whose = "" if layer is None else f" of {layer if parameter is None else parameter.name}"
    return Event(
        kind="clipped",
        step=step,
        parameter=None if parameter is None else parameter.name,
        layer=layer,
        value=outcome.value,
        threshold=outcome.threshold,
        action=_action("clip", dry_run),
        message=f"the gradient{whose} {'would be' if dry_run else 'was'} multiplied by {outcome.coefficient:.3g}",
    )


def _action(name: str, dry_run: bool) -> str:
    return f"would {name}" if dry_run else name
