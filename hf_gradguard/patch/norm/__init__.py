"""Where the norms of a layer act: conversions by name.

A conversion is one small dataclass whose `placement` says it all; see `placement`. Registered, it goes by its name:

    >>> from dataclasses import dataclass
    >>> from hf_gradguard.patch.norm import NormPatch, Placement, norms
    >>> @norms.register("output_only")
    ... @dataclass(frozen=True)
    ... class OutputOnly(NormPatch):
    ...     '''x + norm(f(x)): the branch's own norm is off, a new one is on its output.'''
    ...     summary, citation = "x + norm(f(x))", "nobody"
    ...     placement = Placement(own="off", output=True, final=True)
    >>> norms.parse("output_only")
    OutputOnly()
"""

from hf_gradguard.patch.norm.conversion import Conversion, convert
from hf_gradguard.patch.norm.no_norms import NoNorms
from hf_gradguard.patch.norm.placement import NormPatch, Placement, norms
from hf_gradguard.patch.norm.post import Post
from hf_gradguard.patch.norm.pre import Pre
from hf_gradguard.patch.norm.sandwich import Sandwich

__all__ = ["Conversion", "NoNorms", "NormPatch", "Placement", "Post", "Pre", "Sandwich", "convert", "norms"]
