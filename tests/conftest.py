"""Settings for all tests: no hub, few threads, and quick collections of garbage."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _quick_collections() -> None:
    # Each Trainer collects garbage when it starts; without this it walks through all that the libraries ever imported.
    import transformers.trainer  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
