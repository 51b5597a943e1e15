"""What a recurrent model is made of."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

from transformers.configuration_utils import PreTrainedConfig

from hf_gradguard.registry import nearest

CellName = Literal["lstm", "gru", "rnn_tanh", "rnn_relu"]
InputInit = Literal["xavier", "orthogonal", "uniform"]
RecurrentInit = Literal["orthogonal", "identity", "xavier", "uniform"]
BiasInit = Literal["zeros", "uniform"]
Pooling = Literal["last", "mean", "max"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "cell": get_args(CellName),
    "input_init": get_args(InputInit),
    "recurrent_init": get_args(RecurrentInit),
    "bias_init": get_args(BiasInit),
    "pooling": get_args(Pooling),
}
_SIZES = ("vocab_size", "num_layers", "hidden_size")
_SWITCHES = ("residual", "layer_norm", "locked_dropout", "tie_word_embeddings", "use_cache")
_DROPOUTS = ("embedding_dropout", "input_dropout", "layer_dropout", "output_dropout", "recurrent_dropout")


class RecurrentConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """The configuration of `RecurrentForCausalLM` and `RecurrentForSequenceClassification`.

    By default two layers of 200 LSTM units. The literature's small LSTM (Wojciech Zaremba, Ilya Sutskever, Oriol
    Vinyals 2014, "Recurrent Neural Network Regularization", arXiv 1409.2329, section 4.1), every weight and bias of
    which begins uniform in ±0.1, is the example.

    Raises:
        ValueError: a value is impossible, or an option is misspelt; the message names it and what would do.

    Example:
        >>> config = RecurrentConfig(
        ...     cell="lstm", vocab_size=10_000, hidden_size=200, num_layers=2,
        ...     input_init="uniform", recurrent_init="uniform", bias_init="uniform", init_range=0.1, forget_bias=None,
        ... )
        >>> config.num_hidden_layers
        2
    """

    model_type: ClassVar[str] = "gradguard_recurrent"
    attribute_map: ClassVar[dict[str, str]] = {"num_hidden_layers": "num_layers"}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {
        "embed_tokens": "free_full_weight",
        "layers.*": "free_full_weight",
    }

    vocab_size: int = 10_000
    cell: CellName = "lstm"
    """`lstm`, `gru`, `rnn_tanh` or `rnn_relu`; see `cells` for their equations."""
    num_layers: int = 2
    """Recurrent layers; `num_hidden_layers` is another name for it."""
    hidden_size: int = 200
    """Units of each layer."""
    embedding_size: int | None = None
    """Width of the embedding; None for that of the layers."""
    residual: bool = False
    """Adds a layer's input to its output. The first layer has none where the embedding is of another width."""
    layer_norm: bool = False
    """A LayerNorm at the output of each layer, inside the residual connection: Jimmy Lei Ba, Jamie Ryan Kiros, Geoffrey
    E. Hinton 2016, arXiv 1607.06450. It does not touch the recurrence, as the one inside the cell there does."""
    layer_norm_eps: float = 1e-5

    embedding_dropout: float = 0.0
    """Share of the vocabulary's words that a training pass does not see, wherever they stand: Yarin Gal, Zoubin
    Ghahramani 2016, arXiv 1512.05287. Unused where `inputs_embeds` are given."""
    input_dropout: float = 0.0
    """Dropout between the embedding and the first layer."""
    layer_dropout: float = 0.0
    """Dropout between layers."""
    output_dropout: float = 0.0
    """Dropout at the output of the last layer."""
    recurrent_dropout: float = 0.0
    """Share of the recurrent weights that are zero, the same in all steps of a training pass: DropConnect, as in
    Stephen Merity, Nitish Shirish Keskar, Richard Socher 2017, "Regularizing and Optimizing LSTM Language Models",
    arXiv 1708.02182, section 2."""
    locked_dropout: bool = False
    """Whether the dropouts of inputs, layers and outputs drop the same units in all steps of a row (Gal, Ghahramani
    2016), else others in each (Zaremba et al. 2014)."""

    tie_word_embeddings: bool = False
    """Whether the output layer's weight is the embedding: Ofir Press, Lior Wolf 2017, arXiv 1608.05859. Where their
    widths differ, a projection without a bias stands between the last layer and the output."""

    input_init: InputInit = "xavier"
    """How the weights from a layer's input begin, each gate's block for itself: `xavier` (Xavier Glorot, Yoshua Bengio
    2010, uniform), `orthogonal`, or `uniform` in ±`init_range`."""
    recurrent_init: RecurrentInit = "orthogonal"
    """How the weights from a layer's state begin, each gate's block for itself: `orthogonal` (Andrew M. Saxe, James L.
    McClelland, Surya Ganguli 2013, arXiv 1312.6120), `identity` (the IRNN, with `rnn_relu`: Quoc V. Le, Navdeep Jaitly,
    Geoffrey E. Hinton 2015, arXiv 1504.00941), `xavier`, or `uniform` in ±`init_range`."""
    bias_init: BiasInit = "zeros"
    """How all biases begin but those of norms: `zeros`, or `uniform` in ±`init_range`."""
    init_range: float = 0.1
    """Bound of what begins uniform. The embedding and the output layer always do."""
    forget_bias: float | None = 1.0
    """What the bias of an LSTM's forget gate begins at: Felix A. Gers, Jürgen Schmidhuber, Fred Cummins 2000, "Learning
    to Forget: Continual Prediction with LSTM"; Rafal Jozefowicz, Wojciech Zaremba, Ilya Sutskever 2015, "An Empirical
    Exploration of Recurrent Network Architectures". torch has two biases whose sum acts: this is their sum. None leaves
    it to `bias_init`. The other cells have no forget gate."""

    pooling: Pooling = "last"
    """What of a text the classifier sees: the output at its `last` token, or the `mean` or `max` over its tokens."""

    use_cache: bool = True
    """Whether the state after the last token is returned, outside training."""
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_misspelt(kwargs)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self.check()
        _make_known()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _make_known()

    @property
    def embedding_width(self) -> int:
        """Width of the embedding, also where it is that of the layers."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    def input_width(self, layer: int) -> int:
        """Width of what a layer reads."""
        return self.embedding_width if layer == 0 else self.hidden_size

    def check(self) -> None:
        """Refuses values that no model can be made of; raises ValueError. Models ask for it when they are made."""
        for name, known in _CHOICES.items():
            _check_choice(name, getattr(self, name), known)
        for name in _SIZES:
            _check_size(name, getattr(self, name))
        if self.embedding_size is not None:
            _check_size("embedding_size", self.embedding_size, " (or None, for that of the layers)")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(_refusal(name, getattr(self, name), "must be True or False"))
        for name in _DROPOUTS:
            _check_number(name, getattr(self, name), "from 0 up to, but not including, 1", lambda share: 0 <= share < 1)
        _check_number("init_range", self.init_range, "above 0", lambda bound: bound > 0)
        _check_number("layer_norm_eps", self.layer_norm_eps, "above 0", lambda eps: eps > 0)
        if self.forget_bias is not None:
            _check_number("forget_bias", self.forget_bias, "(or None, to leave it to bias_init)", lambda _: True)

    def _refuse_misspelt(self, options: dict[str, Any]) -> None:
        """Transformers' configs keep whatever they are given: a misspelt option would silently have no effect."""
        known = [field.name for field in dataclasses.fields(self)] + list(self.attribute_map)
        for name in options:
            if name in known or hasattr(type(self), name) or name.endswith("_token_id"):
                continue
            if close := difflib.get_close_matches(name, known, n=1, cutoff=0.7):
                raise ValueError(f"RecurrentConfig has no option {name!r}; did you mean {close[0]!r}?")


def _make_known() -> None:
    # Auto classes ask for a model by its config, so that they need to know of the models from the first config on.
    from hf_gradguard.integrations.auto import register_models

    register_models()


def _refusal(name: str, value: object, remedy: str) -> str:
    return f"RecurrentConfig: {name}={value!r} {remedy}"


def _check_choice(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(_refusal(name, value, f"is unknown{nearest(str(value), known)}. Known: {', '.join(known)}"))


def _check_size(name: str, value: object, otherwise: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(_refusal(name, value, f"must be a whole number of at least 1{otherwise}"))


def _check_number(name: str, value: Any, wanted: str, fits: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not fits(value):
        raise ValueError(_refusal(name, value, f"must be a number {wanted}"))
