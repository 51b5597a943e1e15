"""How a patched checkpoint comes to be loaded as what it is, whoever loads it.

`from_pretrained` makes a model of its config's class, then fills it with weights. In between it asks one party that
the config names, its quantizer, to prepare the model's structure, and the same party once more at the end. GradGuard
registers as one, by Transformers' public functions; nothing is quantised. So `config.json` of a patched model says
`"quantization_config": {"quant_method": "gradguard"}`, beside the patch itself in the field `gradguard`, and with
hf_gradguard imported any `from_pretrained` gives the patched model: an auto class's, the model class's own, a state
dict's. What the loader gives is an ordinary model; nothing of a quantizer is left on it.

Where hf_gradguard is NOT imported, Transformers can't know: it warns of an "Unknown quantization type, got gradguard",
goes on without, reports the patch's weights as unexpected, and the model computes another function. `load_patched`
can't be called without, and so can't go wrong like that; `fold_patches` makes a checkpoint that needs no GradGuard,
where a patch allows it.

This module is imported while Transformers is importing its own, so it needs nothing but the quantizers; all else is
in `patch.loading`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from transformers.quantizers import (  # type: ignore[attr-defined]  # they are, by the documentation
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "gradguard"
"""What GradGuard is called in a config's `quantization_config`."""


class GradGuardPatch(QuantizationConfigMixin):
    """What a patched model has as `quantization_config` while it is loaded.

    Args:
        quant_method: `gradguard`.
        others: anything else that the config has there.

    Raises:
        ValueError: there is something else there, so that the model is to be quantised as well.
    """

    dequantize = True
    """Transformers then takes the quantizer off the model when it is loaded."""

    def __init__(self, quant_method: str = METHOD, **others: Any) -> None:
        if others:
            raise ValueError(
                f"quantization_config has {', '.join(sorted(others))} beside quant_method={METHOD!r}: a patched "
                "checkpoint can't be quantised while it is loaded. Take that out; or load it, merge the patch into the "
                "weights with fold_patches(model), save that, and quantise it"
            )
        self.quant_method: Any = quant_method  # one's own method has no name in their enum


class PatchLoader(HfQuantizer):
    """Builds a patch's structure before the weights come, and gives values to what the checkpoint has none for."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses weights that are to stay on disk, or in memory beside a device.

        Raises:
            ValueError: they are.
        """
        devices = kwargs.get("device_map")
        places = {str(device) for device in devices.values()} if isinstance(devices, dict) else {devices}
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                f"device_map puts parts of a patched model on {' and '.join(sorted(map(str, places)))}: weights that "
                "are brought to the device only for the length of a module's call are not there when a patch needs "
                "them. Give the model enough devices, or a smaller dtype"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from hf_gradguard.patch.loading import Reconstruction

        self._reconstruction = Reconstruction(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self._reconstruction.finish()
        vars(model).pop("is_quantized", None)

    def is_serializable(self) -> bool:
        """Patched models save as others do."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Patched models train."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """They do so without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Generation may compile them."""
        return True


def register(quantizers: object = None) -> None:
    """Makes GradGuard known to Transformers; once is enough, and twice does no harm.

    Args:
        quantizers: the module `transformers.quantizers`, which an import hook gives.
    """
    for add, kind in ((register_quantization_config, GradGuardPatch), (register_quantizer, PatchLoader)):
        with suppress(ValueError):  # known already
            add(METHOD)(kind)
