"""The list of patches says what the patches do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hf_gradguard.patch.catalogue import PatchInfo, list_patches
from hf_gradguard.patch.config import PARTS
from hf_gradguard.patch.fold import fold_patches
from hf_gradguard.patch.model import patch_model
from hf_gradguard.patch.presets import PRESETS
from hf_gradguard.patch.residual import MultiplierPatch, rules
from tests.patch.models import CASES, logits

INFOS = list_patches()
MODELS = {
    "in pre-norm models": "llama",
    "in post-norm models": "bart",
    "where a norm follows the embeddings": "modernbert",
}


def outputs(model: Any, name: str) -> Any:
    with torch.no_grad():
        return logits(model, CASES[name].inputs())


def text(info: PatchInfo, options: str = "") -> str:
    """What `patch_model` takes for it."""
    name = info.name + (f":{options}" if options else "")
    return name if info.part == "preset" else f"{info.part}={name}"


def case_for(info: PatchInfo, condition: str) -> tuple[str, str]:
    """A model for which a condition holds, and the options that it asks for."""
    first, _, rest = condition.partition(", ")
    options = first.removeprefix("with ") if first.startswith("with ") else ""
    default = "bart" if info.name == "deepnorm" else "modernbert"
    return MODELS.get(rest if options and rest else first, default), options


def test_all_that_is_registered_is_listed_once() -> None:
    listed = [(info.part, info.name) for info in INFOS]
    assert len(set(listed)) == len(listed)
    expected = {("preset", name) for name in PRESETS}
    expected |= {
        (part, name) for part, registry in PARTS.items() for name in registry.names() if name != registry.absent
    }
    assert set(listed) == expected


def test_every_entry_has_a_summary_and_a_citation_and_a_reason_where_one_is_due() -> None:
    for info in INFOS:
        assert info.summary
        assert info.citation
        assert (info.unfoldable is None) == (info.folds == "always")


def test_a_rule_of_ones_own_is_listed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_policies", dict(rules._policies))

    @rules.register("own")
    @dataclass(frozen=True)
    class Own(MultiplierPatch):
        summary, citation, norm = "x + k·y", "nobody", "pre"
        k: float
        is_on: bool = True

        @property
        def preserving(self) -> bool:
            return self.k == 1

    (info,) = [info for info in list_patches() if info.name == "own"]
    assert info == PatchInfo("residual", "own", "x + k·y", "nobody", "k=…,is_on=true", "with k=1", "always", None)


@pytest.mark.parametrize("info", [info for info in INFOS if info.preserving != "never"], ids=text)
def test_what_is_said_to_keep_a_models_function_does(info: PatchInfo) -> None:
    name, options = case_for(info, info.preserving)
    model = CASES[name].make()
    before = outputs(model, name)
    patch_model(model, text(info, options))
    torch.testing.assert_close(outputs(model, name), before)


@pytest.mark.parametrize(
    "info", [info for info in INFOS if info.preserving == "never" and info.name != "lsuv"], ids=text
)
def test_what_is_said_to_change_a_models_function_does(info: PatchInfo) -> None:
    name = "bart" if info.name == "deepnorm" else "llama"
    model = CASES[name].make()
    before = outputs(model, name)
    patch_model(model, text(info))
    assert not torch.allclose(outputs(model, name), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("info", [info for info in INFOS if info.name != "lsuv"], ids=text)
def test_what_is_said_to_fold_does_and_nothing_else(info: PatchInfo) -> None:
    name, _ = case_for(info, info.folds)
    model = patch_model(CASES[name].make(), text(info))
    if info.folds == "never":
        with pytest.raises(ValueError, match="can't become a stock model"):
            fold_patches(model)
        return
    before = outputs(model, name)
    torch.testing.assert_close(outputs(fold_patches(model), name), before, rtol=1e-5, atol=1e-5)
