"""Unscaling the gradients of mixed precision, where somebody else may have done it already."""

from __future__ import annotations

from typing import Any


def unscale_once(accelerator: Any, optimizer: Any = None) -> None:
    """Unscales the gradients, unless that has been done since the last update: a scaler refuses to do it twice, and has
    no public way to ask it.

    Args:
        accelerator: whose scaler.
        optimizer: whose gradients; all that the accelerator has prepared where it is None.
    """
    try:
        accelerator.unscale_gradients(optimizer)
    except RuntimeError as error:
        if "unscale_() has already been called" not in str(error):
            raise
