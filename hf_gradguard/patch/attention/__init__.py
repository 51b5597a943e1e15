"""Changes inside attention, by name.

One dataclass each, in a file of its own, that puts something behind the projections of queries and keys; see `patch`
for what it says of itself and `heads` for how it gets there.
"""

from hf_gradguard.patch.attention.logit_scale import LogitScale
from hf_gradguard.patch.attention.patch import AttentionPatch, attentions
from hf_gradguard.patch.attention.qk_norm import QKNorm

__all__ = ["AttentionPatch", "LogitScale", "QKNorm", "attentions"]
