"""Records of runs that never took place, written by the real writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_gradguard.events import Event
from hf_gradguard.observe.layout import Group, Layout, ParameterInfo
from hf_gradguard.record.writer import RecordWriter, Window


def layout(stacks: dict[str, int], parameters_a_layer: int = 1) -> Layout:
    """Embeddings, so many layers in each stack, and a head; each layer of so many parameters."""
    groups = [Group("embeddings", "embeddings")]
    for stack, count in stacks.items():
        groups += [Group(f"{stack} layer {depth}".strip(), "layer", stack, depth) for depth in range(count)]
    groups.append(Group("head", "head"))
    infos = []
    for index, group in enumerate(groups):
        for number in range(parameters_a_layer if group.kind == "layer" else 1):
            name = f"{group.name.replace(' ', '.')}.weight{number}"
            infos.append(ParameterInfo(name, index, None, (16, 16), "float32"))
    return Layout(tuple(groups), tuple(infos))


def write(
    directory: Path,
    layer_norms: NDArray[np.float64],
    *,
    stacks: dict[str, int] | None = None,
    losses: NDArray[np.float64] | None = None,
    events: list[Event] | None = None,
    status: str | None = "finished",
    weights: bool = True,
    run: dict[str, Any] | None = None,
) -> Path:
    """Writes a record with one parameter a layer, whose norms are given `[windows, layers]`.

    A negative norm is no gradient. Embeddings and head have a norm of 1. `status=None` leaves the record as a killed
    run does.
    """
    stacks = stacks or {"": layer_norms.shape[1]}
    facts = {
        "started": "2026-01-02T03:04:05+00:00",
        "model": {"class": "BertLMHeadModel", "parameters": 5_100_000, "trainable_parameters": 5_100_000},
        "versions": {"python": "3.11", "torch": "2.13", "transformers": "5.23"},
        "guard": {"thresholds": {}},
    }
    writer = RecordWriter(directory / "gradguard", layout(stacks), facts | (run or {}), record_every=1)
    for index, norms in enumerate(layer_norms):
        row = np.concatenate([[1.0], norms, [1.0]])
        writer.window(
            Window(
                step=index + 1,
                loss=None if losses is None else float(losses[index]),
                learning_rate=1e-3,
                total_norm=float(np.sqrt(np.sum(np.square(np.where(row == -1.0, 0.0, row))))),
                norms=row,
                clip_coefficient=1.0,
                updated=bool(np.isfinite(row).all()),
                seconds=0.5 * (index + 1),
            )
        )
        if weights and index % 25 == 0:
            writer.weights(index + 1, np.full(len(row), 10.0), np.full(len(row), 1e-3) * (1 + np.arange(len(row))))
    for event in events or []:
        writer.event(event)
    writer.flush()
    if status is not None:
        writer.close(status)
    return directory


def healthy(windows: int = 150, layers: int = 12, seed: int = 0) -> NDArray[np.float64]:
    """Norms of a run in which every layer gets its share `[windows, layers]`."""
    random = np.random.default_rng(seed)
    depth = np.linspace(0.9, 1.1, layers)
    return 0.4 * depth * np.exp(0.25 * random.standard_normal((windows, layers)))


def vanishing(windows: int = 150, layers: int = 100, seed: int = 0) -> NDArray[np.float64]:
    """Norms of a run that starts even and whose lower layers fade to 1e-9 of the top `[windows, layers]`."""
    random = np.random.default_rng(seed)
    progress = np.clip((np.arange(windows) - 15) / 60, 0, 1)[:, None]
    decades = 9 * progress * np.linspace(1, 0, layers) ** 1.2
    return 10**-decades * np.exp(0.25 * random.standard_normal((windows, layers)))


def losses(windows: int, low: float, seed: int = 0) -> NDArray[np.float64]:
    """A loss that falls from 5.5 to `low` `[windows]`."""
    random = np.random.default_rng(seed)
    return low + (5.5 - low) * np.exp(-np.arange(windows) / 30) + 0.05 * random.standard_normal(windows)
