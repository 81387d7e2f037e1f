"""The computations of a model that are ours: attention, adapters, norms, the loss."""
