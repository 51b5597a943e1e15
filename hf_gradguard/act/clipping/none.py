"""No clipping."""

from __future__ import annotations

from dataclasses import dataclass

from hf_gradguard.act.clipping.gradient import Gradient
from hf_gradguard.act.clipping.policy import ClipPolicy, HostClip, policies


@policies.register("none")
@dataclass
class NoClipping(ClipPolicy):
    """Leaves every gradient as it is."""

    def clip(self, gradient: Gradient) -> HostClip | None:
        """None."""
        return None
