"""LSTM, GRU and plain recurrent networks as ordinary Transformers models, on torch's own cells.

    model = RecurrentForCausalLM(RecurrentConfig(cell="lstm", vocab_size=256, hidden_size=200, num_layers=2))

They train under the same Trainer, callback and report as the Transformers they are compared with, generate, save and
load, also by the auto classes. A layer of depth is one recurrent layer.

`configuration` says what they are made of, `cells` which recurrent cells there are (a further one is an entry in its
table), `layer` what one layer computes, `modeling` the models, `state` what is carried from one call to the next,
`padding` how rows of several lengths are read, `dropout` and `initialisation` what their names say.
"""
