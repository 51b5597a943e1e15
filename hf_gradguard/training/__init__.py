"""What the training recipes share: arguments, text, tokenizers, models, metrics, checkpoints and the model card.

A recipe puts these together and reads from top to bottom; `recipes/train_clm.py` is one. Nothing of the rest of the
package needs this, and `import hf_gradguard` does not import it.
"""
