"""Recurrent language models and classifiers as ordinary Transformers models."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutput
from transformers.utils import can_return_tuple  # type: ignore[attr-defined]  # all models import it from here

from hf_gradguard.models.cells import CELLS
from hf_gradguard.models.configuration import RecurrentConfig
from hf_gradguard.models.dropout import drop_words, make_dropout
from hf_gradguard.models.initialisation import initialise_cell, initialise_linear
from hf_gradguard.models.layer import RecurrentLayer
from hf_gradguard.models.padding import Padding, find_padding
from hf_gradguard.models.state import RecurrentState


class RecurrentPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """What the recurrent models have in common: their configuration, and how their weights begin.

    Args:
        config: of the model.

    Raises:
        ValueError: it has been given values that no model can be made of.
    """

    config: RecurrentConfig
    config_class = RecurrentConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RecurrentLayer"]  # noqa: RUF012  # Transformers' own protocol
    _is_stateful = True

    def __init__(self, config: RecurrentConfig) -> None:
        config.check()
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.RNNBase):
            initialise_cell(module, self.config)
        elif isinstance(module, nn.Linear):
            initialise_linear(module, self.config)
        elif isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -self.config.init_range, self.config.init_range)
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]


class RecurrentModel(RecurrentPreTrainedModel):  # type: ignore[no-untyped-call]
    """The embedding and the recurrent layers, without a head.

    Args:
        config: of the model.
    """

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_width)
        self.layers = nn.ModuleList([RecurrentLayer(config, index) for index in range(config.num_layers)])
        self.dropout = make_dropout(config.output_dropout, config.locked_dropout)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Reads text.

        Args:
            input_ids: tokens, int64 `[batch, steps]`.
            attention_mask: not zero where there is a token, `[batch, steps]`. Padding, wherever it stands, is not read:
                each row gives what it would give alone, and zeros where it is padded. Without a mask everything is
                read. Columns for what is in `past_key_values` may stand in front.
            inputs_embeds: in place of `input_ids`, `[batch, steps, embedding_size]`.
            past_key_values: the state to go on from, which an earlier call returned; it stays as it is.
            use_cache: whether to return the state after the last token. By default so where one is given and, outside
                training, where the configuration says so.
            output_hidden_states: whether to return the embeddings and each layer's output.
            kwargs: what other models take; nothing of it has an effect.

        Returns:
            `last_hidden_state`, `[batch, steps, hidden_size]`; `past_key_values`, a `RecurrentState`; `hidden_states`.

        Raises:
            ValueError: neither or both of tokens and embeddings are given, or a mask or a state that does not fit.
        """
        embedded = self._embed(input_ids, inputs_embeds)
        batch, steps = embedded.shape[:2]
        past = self._past(past_key_values, batch)
        read = past.length if past else 0
        padding = find_padding(attention_mask, batch, steps, read)
        hidden = embedded if padding is None else padding.to_left(embedded)
        outputs, states = [hidden], []
        for layer, before in zip(self.layers, past.states if past else [()] * len(self.layers), strict=True):
            hidden, *after = layer(hidden, None if padding is None else padding.lengths, *before)
            outputs.append(hidden)
            states.append(after)
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=_at_their_places(self.dropout(hidden), padding),
            past_key_values=RecurrentState(states, read + steps) if use_cache else None,
            hidden_states=tuple(_at_their_places(output, padding) for output in outputs)
            if output_hidden_states
            else None,
        )

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            both = "neither" if input_ids is None else "both"
            raise ValueError(f"input_ids and inputs_embeds: {both} of them given; give one")
        if input_ids is None:
            return cast(Tensor, inputs_embeds)
        embedded: Tensor = self.embed_tokens(input_ids)
        if self.training and self.config.embedding_dropout > 0:
            embedded = drop_words(embedded, input_ids, self.embed_tokens.num_embeddings, self.config.embedding_dropout)
        return embedded

    def _past(self, given: Cache | None, batch: int) -> RecurrentState | None:
        """The state to go on from, if there is one."""
        if given is None or _is_untouched(given):
            return None
        if not isinstance(given, RecurrentState):
            raise ValueError(
                f"past_key_values is a {type(given).__name__}; a recurrent model goes on from a RecurrentState, the "
                "past_key_values that a call with use_cache=True returned"
            )
        found = {tuple(tuple(tensor.shape) for tensor in layer) for layer in given.states}
        expected = ((batch, self.config.hidden_size),) * len(CELLS[self.config.cell].states)
        if found != {expected} or len(given) != len(self.layers):
            held = " or ".join(" and ".join(str(list(shape)) for shape in layer) for layer in sorted(found))
            wanted = " and ".join(str(list(shape)) for shape in expected)
            raise ValueError(
                f"past_key_values holds {held} in each of {len(given)} layers, where this call needs {wanted} in "
                f"{len(self.layers)}: give the state of the same model for as many rows, or None to begin anew"
            )
        return given


class RecurrentForCausalLM(RecurrentPreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A recurrent language model: with a softmax over the vocabulary on top.

    **Truncated backpropagation through time.** The state after a batch is the beginning of the next one, whose rows go
    on where those of this one ended; gradients end at the batch:

        state = None
        for batch in stream:
            outputs = model(**batch, past_key_values=state, use_cache=True)
            outputs.loss.backward()
            state = outputs.past_key_values.detach()

    Nothing is kept in the model or its configuration, so that a Trainer does it by an override of `compute_loss` that
    holds the state between its calls, and evaluation, which is given none, does not disturb it. Such batches bring
    their targets along as `shift_labels`: with `labels` alone the last token of a batch would have none, as the first
    of the next is not in it. (As `labels` as well under Trainer, which counts the targets only where there are any.)

    Args:
        config: of the model.

    Example:
        >>> import torch
        >>> from hf_gradguard import RecurrentConfig, RecurrentForCausalLM
        >>> model = RecurrentForCausalLM(RecurrentConfig(cell="gru", vocab_size=256, hidden_size=32)).eval()
        >>> model.generate(torch.tensor([[72, 101]]), max_new_tokens=3, do_sample=False).shape
        torch.Size([1, 5])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  # Transformers' own protocol

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        self.model = RecurrentModel(config)
        width = config.embedding_width if config.tie_word_embeddings else config.hidden_size
        narrows = width != config.hidden_size
        self.projection = nn.Linear(config.hidden_size, width, bias=False) if narrows else nn.Identity()
        self.lm_head = nn.Linear(width, config.vocab_size)
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predicts the next token at each place; see `RecurrentModel.forward` for what is not said here.

        Args:
            labels: the tokens themselves, int64 `[batch, steps]`; the place before each is where it is predicted. What
                is −100 has no part in the loss.
            logits_to_keep: of how many places at the end to compute the logits, or of which; 0 for all.
            kwargs: for the loss: `shift_labels`, what is to be predicted at each place, in place of `labels`; and
                `num_items_in_batch`, the number of targets to divide by, which Trainer gives.

        Returns:
            `loss`, the mean over targets; `logits`, `[batch, steps, vocab_size]`; `past_key_values`; `hidden_states`.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.projection(outputs.last_hidden_state[:, kept]))
        return CausalLMOutputWithPast(
            loss=self._loss(logits, labels, **kwargs),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _loss(self, logits: Tensor, labels: Tensor | None, **options: Any) -> Tensor | None:
        # `shift_labels` is no argument of `forward`: of a model with two labels, Trainer would want both to evaluate.
        if options.get("shift_labels") is not None:
            options["shift_labels"] = options["shift_labels"].contiguous()
        elif labels is None:
            return None
        return cast(Tensor, self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **options))

    def prepare_inputs_for_generation(  # type: ignore[override]  # everything else is given by name
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `generate` calls the model with: Transformers' own, without a cache that the model has no use for.

        For some of these a mask would be prepared as attention needs it.
        """
        if past_key_values is not None and _is_untouched(past_key_values):
            past_key_values = None
        prepare: Any = super().prepare_inputs_for_generation  # type: ignore[misc]  # it wants a GenerativePreTrainedModel
        prepared = prepare(input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs)
        return cast(dict[str, Any], prepared)


class RecurrentForSequenceClassification(RecurrentPreTrainedModel):  # type: ignore[no-untyped-call]
    """A recurrent classifier of texts: a linear layer on what `config.pooling` takes of the last layer's outputs.

    Args:
        config: of the model; `num_labels` and `problem_type` as for any classifier of Transformers.

    Example:
        >>> import torch
        >>> from hf_gradguard import RecurrentConfig, RecurrentForSequenceClassification
        >>> config = RecurrentConfig(cell="lstm", vocab_size=256, hidden_size=32, pooling="max", num_labels=3)
        >>> model = RecurrentForSequenceClassification(config)
        >>> model(torch.tensor([[72, 101, 0]]), attention_mask=torch.tensor([[1, 1, 0]])).logits.shape
        torch.Size([1, 3])
    """

    accepts_loss_kwargs = False
    """The loss is the mean over a batch, which Trainer is to divide by the number of batches that it accumulates."""

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = RecurrentModel(config)
        self.score = nn.Linear(config.hidden_size, cast(int, config.num_labels))
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classifies texts; see `RecurrentModel.forward` for what is not said here.

        Args:
            labels: classes, int64 `[batch]`; for several classes at a time, float `[batch, num_labels]`; for
                regression, float `[batch]` or `[batch, num_labels]`. Which it is, is Transformers' `problem_type`.

        Returns:
            `loss`, the mean over rows; `logits`, `[batch, num_labels]`; `hidden_states`. An empty row is pooled to
            zeros.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.score(self._pool(outputs.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    def _pool(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """`[batch, steps, width]` to `[batch, width]`; padding is zeros in it already."""
        if attention_mask is None:
            attention_mask = hidden.new_ones(hidden.shape[:2])
        real = attention_mask.ne(0).unsqueeze(-1)
        if self.config.pooling == "mean":
            return hidden.sum(dim=1) / real.sum(dim=1).clamp(min=1)
        if self.config.pooling == "max":
            highest = hidden.masked_fill(~real, float("-inf")).amax(dim=1)
            return highest.masked_fill(~real.any(dim=1), 0)
        places = torch.arange(hidden.shape[1], device=hidden.device).view(1, -1, 1)
        last = (places * real).amax(dim=1, keepdim=True)
        return hidden.gather(1, last.expand(-1, 1, hidden.shape[-1])).squeeze(1)


def _at_their_places(hidden: Tensor, padding: Padding | None) -> Tensor:
    return hidden if padding is None else padding.back(hidden)


def _is_untouched(cache: Cache) -> bool:
    """Whether it is a cache of keys and values before the first token, as which `generate` begins."""
    return not isinstance(cache, RecurrentState) and bool(cache.get_seq_length() == 0)
