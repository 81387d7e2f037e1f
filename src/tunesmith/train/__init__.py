"""The training loop and what it needs: optimizer, stopping, checkpoints, tracking."""
