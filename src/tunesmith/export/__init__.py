"""A tuned model as a Hugging Face folder, proven equal."""
