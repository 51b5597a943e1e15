"""Names on the hub while there is none: said at once, and not after minutes of retries."""

from __future__ import annotations

import contextlib
import threading
from functools import cache
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

TIMEOUT = 3.0
"""Seconds to wait for a sign of the hub, once for a whole run."""


@cache
def is_reachable() -> bool:
    """Whether the hub answers: one request without retries, unless it is known from `HF_HUB_OFFLINE` that it must not
    be asked."""
    if constants.is_offline_mode():
        return False
    answers: list[int] = []
    # In a thread, as no timeout holds for the resolver of names, which may take half a minute.
    asking = threading.Thread(target=_ask, args=(answers,), daemon=True)
    asking.start()
    asking.join(TIMEOUT)
    return bool(answers)


def _ask(answers: list[int]) -> None:
    # Of whichever client the library uses: no name, no route, no answer, no proxy.
    with contextlib.suppress(Exception):
        answers.append(huggingface_hub.get_session().head(constants.ENDPOINT, timeout=TIMEOUT).status_code)


def prepare(name: str, kind: str, remedy: str) -> None:
    """Sees that a name can be looked up, in the hub or in this machine's cache of it.

    Where the hub can't be reached, the libraries are told so, and look into the cache alone.

    Args:
        name: of a model or dataset, such as `gpt2`.
        kind: what it names, for the message: `model`, `dataset` or `tokenizer`.
        remedy: what to give instead, where there is neither hub nor cached copy.

    Raises:
        ValueError: `name` is a path that does not exist, or the hub can't be reached and nothing of that name has been
            kept from an earlier time.
    """
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no folder {name!r} for the {kind}; {remedy}")
    if is_reachable():
        return
    _go_offline()
    if not _is_cached(name, "datasets" if kind == "dataset" else "models"):
        why = "HF_HUB_OFFLINE is set" if _was_offline else "it can't be reached from here"
        raise ValueError(
            f"{kind} {name!r} is no folder here, would have to come from the hub ({why}), and is not in this machine's "
            f"cache of it; {remedy}"
        )


_was_offline = constants.is_offline_mode()


def _go_offline() -> None:
    # What these libraries read of the environment they have read when they were imported.
    import datasets

    constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
    datasets.config.HF_DATASETS_OFFLINE = True


def _is_cached(name: str, kind: str) -> bool:
    folder = f"{kind}--{name.replace('/', '--')}"
    if any(Path(constants.HF_HUB_CACHE, folder, "snapshots").glob("*/*")):
        return True
    if kind != "datasets":
        return False
    import datasets

    *owner, own = name.split("/")
    folder = "___".join([*owner, datasets.naming.camelcase_to_snakecase(own)])
    return Path(datasets.config.HF_DATASETS_CACHE, folder).is_dir()
