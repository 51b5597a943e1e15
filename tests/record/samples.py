"""Layouts and windows for the tests of the record."""

from __future__ import annotations

import numpy as np

from hf_gradguard.observe.layout import Group, Layout, ParameterInfo
from hf_gradguard.observe.reach import TimeProfile
from hf_gradguard.record.writer import AccumulationRow, Window


def layout_of(sizes: dict[str, int], kinds: dict[str, str] | None = None) -> Layout:
    """Groups of so many parameters each, which take turns in the order of parameters."""
    groups = tuple(Group(name, (kinds or {}).get(name, "layer"), depth=index) for index, name in enumerate(sizes))
    parameters = [
        ParameterInfo(f"{name.replace(' ', '.')}.p{index}.weight", group, None, (2, 3), "float32")
        for group, (name, size) in enumerate(sizes.items())
        for index in range(size)
    ]
    return Layout(groups, tuple(sorted(parameters, key=lambda info: info.name.split(".")[-2])))


SMALL = layout_of(
    {"embeddings": 2, "layer 0": 3, "layer 1": 3, "head": 1}, {"embeddings": "embeddings", "head": "head"}
)


def norms_at(step: int, count: int) -> np.ndarray:
    return np.random.default_rng(step).lognormal(-4, 2, count)


def window_at(step: int, count: int = len(SMALL.parameters), **changes: object) -> Window:
    norms = norms_at(step, count)
    values = {
        "step": step,
        "loss": 1 / step,
        "learning_rate": 1e-3 / step,
        "total_norm": float(np.sqrt((norms**2).sum())),
        "norms": norms,
        "clip_coefficient": 1.0 - 0.5 / step,
        "updated": step % 3 != 0,
        "seconds": 0.25 * step,
    }
    return Window(**(values | changes))


def held_at(step: int, **changes: object) -> AccumulationRow:
    """What is held where every third window updates; the noise scale is unknown up to the first update."""
    rng = np.random.default_rng(step)
    values = {
        "step": step,
        "windows": (step - 1) % 3 + 1,
        "weight": float(rng.integers(1, 10_000)),
        "accumulated_norm": rng.lognormal(-4, 2),
        "noise_scale": rng.lognormal(5, 2) if step > 3 else np.nan,
        "updated": step % 3 == 0,
    }
    return AccumulationRow(**(values | changes))


def profile_at(step: int, lags: int = 20) -> TimeProfile:
    """Six samples, a few of which are zero, and one of which overflowed."""
    norms = np.random.default_rng(step).lognormal(-80, 40, (6, lags))
    norms[:2, -1], norms[2, 3], norms[:3, lags // 2 :] = 0.0, np.inf, np.nan
    return TimeProfile.of(norms)


def assert_same_profile(found: TimeProfile, expected: TimeProfile) -> None:
    for name in ("lags", "mean", "quantiles", "zero_share", "samples"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
