"""How Transformers' auto classes come to know the recurrent models, for nothing until one is wanted.

`AutoConfig` learns of the configuration as soon as Transformers has it, which imports no model. The models are made
known when the first configuration is made: an auto class finds a model by its configuration, so that none can be asked
for before. Until then no module of Transformers is imported on their behalf, and none in the middle of its own import.
"""

from __future__ import annotations

from functools import cache
from typing import Any


def register(configurations: Any) -> None:
    """Makes the configuration known to `AutoConfig`; once is enough, and twice does no harm.

    Args:
        configurations: the module `transformers.models.auto.configuration_auto`, which an import hook gives.
    """
    from hf_gradguard.models.configuration import RecurrentConfig

    configurations.AutoConfig.register(RecurrentConfig.model_type, RecurrentConfig, exist_ok=True)


@cache
def register_models() -> None:
    """Makes the models known to `AutoModel` and its kin."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    from hf_gradguard.models.configuration import RecurrentConfig
    from hf_gradguard.models.modeling import (
        RecurrentForCausalLM,
        RecurrentForSequenceClassification,
        RecurrentModel,
    )

    AutoModel.register(RecurrentConfig, RecurrentModel, exist_ok=True)
    AutoModelForCausalLM.register(RecurrentConfig, RecurrentForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(RecurrentConfig, RecurrentForSequenceClassification, exist_ok=True)
