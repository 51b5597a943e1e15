"""On a GPU: cuDNN reads the weights where they are, and computes what the CPU does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from hf_gradguard import RecurrentForCausalLM
from tests.models.recurrent import CELLS, language_model, padded, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = padded([tokens(1, 6)[0], tokens(1, 3, seed=2)[0]], "left")
    return ids.cuda(), mask.cuda()


@pytest.mark.parametrize("cell", CELLS)
def test_it_computes_what_the_cpu_does(cell: str) -> None:
    model = language_model(cell=cell, layer_norm=True, residual=True).double()
    ids, mask = batch()
    with torch.no_grad():
        expected = model(ids.cpu(), attention_mask=mask.cpu()).logits
        torch.testing.assert_close(model.cuda()(ids, attention_mask=mask).logits.cpu(), expected)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("cell", CELLS)
def test_weights_are_in_one_piece_however_they_came_there(cell: str, share: float, tmp_path: Path) -> None:
    made = language_model(cell=cell, recurrent_dropout=share)
    made.save_pretrained(tmp_path)
    ids, mask = batch()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not part of single contiguous chunk")  # gathered at every call
        for model in (made.cuda(), RecurrentForCausalLM.from_pretrained(tmp_path, device_map="cuda")):
            for _ in range(2):
                model.train()
                model(ids, attention_mask=mask, labels=ids).loss.backward()
                with torch.no_grad():
                    model.eval()(ids)


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_weights_are_dropped_there_too(cell: str) -> None:
    model: Any = language_model(cell=cell, recurrent_dropout=0.5, num_layers=1).cuda().train()
    ids, _ = batch()
    torch.manual_seed(1)
    found = model(ids).logits
    weight = model.model.layers[0].cell.weight_hh_l0
    torch.manual_seed(1)
    with torch.no_grad():
        weight.copy_(functional.dropout(weight, 0.5))
        torch.testing.assert_close(found, model.eval()(ids).logits)


def test_several_passes_may_share_one_backward_there_too() -> None:
    model = language_model(recurrent_dropout=0.5).cuda().train()
    ids, _ = batch()
    first = model(ids, labels=ids, use_cache=True)
    second = model(ids, labels=ids, past_key_values=first.past_key_values)
    (first.loss + second.loss).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
