"""What generates answers: vLLM, transformers."""
