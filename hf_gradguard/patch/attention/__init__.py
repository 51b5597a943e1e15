"""Changes inside attention, by name; see `patch`."""

from hf_gradguard.patch.attention.patch import AttentionPatch, attentions

__all__ = ["AttentionPatch", "attentions"]
