"""Policies that act on gradients: the only code that changes gradients or weights."""
