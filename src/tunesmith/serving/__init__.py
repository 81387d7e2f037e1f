"""A tuned model put to use: a chat in the terminal, vLLM's server."""
