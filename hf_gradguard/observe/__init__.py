"""What the gradients are: layout of the parameters, norms, readings. Decides nothing."""
