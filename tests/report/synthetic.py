"""Records of runs that never took place, written by the real writer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_gradguard.events import Event
from hf_gradguard.observe.layout import Group, Layout, ParameterInfo
from hf_gradguard.observe.reach import TimeProfile
from hf_gradguard.record.writer import AccumulationRow, RecordWriter, Window


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
    coefficients: NDArray[np.float64] | None = None,
    updated: NDArray[np.bool_] | None = None,
    rows: list[AccumulationRow] | None = None,
    profiles: Mapping[int, TimeProfile] | None = None,
) -> Path:
    """Writes a record with one parameter a layer, whose norms are given `[windows, layers]`.

    A negative norm is no gradient. Embeddings and head have a norm of 1. `status=None` leaves the record as a killed
    run does. Nothing is clipped, and every finite window is an update, unless `coefficients` (NaN for unknown) and
    `updated` say otherwise.
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
        coefficient = 1.0 if coefficients is None else float(coefficients[index])
        writer.window(
            Window(
                step=index + 1,
                loss=None if losses is None else float(losses[index]),
                learning_rate=1e-3,
                total_norm=float(np.sqrt(np.sum(np.square(np.where(row == -1.0, 0.0, row))))),
                norms=row,
                clip_coefficient=None if np.isnan(coefficient) else coefficient,
                updated=bool(np.isfinite(row).all() if updated is None else updated[index]),
                seconds=0.5 * (index + 1),
            )
        )
        if weights and index % 25 == 0:
            writer.weights(index + 1, np.full(len(row), 10.0), np.full(len(row), 1e-3) * (1 + np.arange(len(row))))
    for step, profile in (profiles or {}).items():
        writer.time_profile(step, profile)
    for held in rows or []:
        writer.accumulation(held)
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


@dataclass
class Acted:
    """What the policies of an invented run did to its windows."""

    directory: Path
    deferred: int = 0
    skipped: int = 0
    clipped: int = 0
    factors: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """Windows of each update."""
    batches: list[float] = field(default_factory=list)
    """Target tokens of each update."""
    steps: list[int] = field(default_factory=list)
    """Of the windows that updated."""


def acting(
    directory: Path,
    windows: int = 1200,
    *,
    dry_run: bool = False,
    accumulate: str = "norm_threshold:threshold=0.75,max_windows=8,reduce=mean",
    clip: str = "zclip",
    seed: int = 0,
) -> Acted:
    """A run whose policies hold back more windows as it goes on, skip two of NaN and clip every 7th update."""
    random = np.random.default_rng(seed)
    norms = healthy(windows, seed=seed)
    bad = {windows // 3, windows // 2}
    norms[list(bad)] = np.nan
    told, rows, events = Acted(directory), [], []
    updated, coefficients = np.zeros(windows, bool), np.full(windows, np.nan)
    would = "would " if dry_run else ""
    held, weight, noise = 0, 0.0, 2000.0
    for index in range(windows):
        step = index + 1
        if index in bad:
            told.skipped += 1
            events.append(
                Event(
                    "nonfinite", step, "layer.3.weight0", "layer 3", 1, value=np.nan, action=f"{would}skip",
                    message="the gradient of layer.3.weight0 and of 4 more parameters holds NaN since micro-batch 1; "
                    "the update was skipped, the weights are as before. The module encoder.layer.3.mlp made it in the "
                    "forward pass, from inputs between -3.1 and 88.7.",
                )
            )  # fmt: skip
            continue
        held, weight = held + 1, weight + float(random.integers(3500, 4100))
        noise *= np.exp(0.05 * random.standard_normal() + 4 / windows)
        norm = 1.5 / np.sqrt(held) * np.exp(0.1 * random.standard_normal())
        updated[index] = held >= 1 + min(7, 8 * index // windows + random.integers(0, 2)) or step == windows
        rows.append(AccumulationRow(step, held, weight, norm, noise if index > 20 else np.nan, bool(updated[index])))
        if not updated[index]:
            told.deferred += 1
            events.append(Event("deferred", step, value=norm, threshold=0.75, action=f"{would}hold"))
            continue
        told.sizes.append(held)
        told.batches.append(weight)
        told.steps.append(step)
        held, weight, coefficients[index] = 0, 0.0, 1.0
        if len(told.sizes) % 7 == 0:
            told.clipped += 1
            coefficients[index] = float(np.exp(-2 * random.random()))
            told.factors.append(coefficients[index])
            events.append(Event("clipped", step, value=norm, threshold=norm / 2, action=f"{would}clip"))
    guard = {"thresholds": {}, "nonfinite": "skip:max_consecutive=20", "clip": clip, "accumulate": accumulate}
    write(
        directory,
        norms,
        losses=losses(windows, 3.0, seed=seed),
        events=events,
        run={"guard": guard | {"dry_run": dry_run}},
        coefficients=None if dry_run else coefficients,
        updated=np.ones(windows, bool) if dry_run else updated,
        rows=rows,
    )
    return told
