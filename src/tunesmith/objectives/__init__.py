"""What a training minimizes, from the log-probs of the trained tokens."""
