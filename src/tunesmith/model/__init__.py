"""Models: load them with bounded memory, adapt, shard, and compute the loss."""
