"""Is the tuned model better? Generate with base and tuned, score both, report."""
