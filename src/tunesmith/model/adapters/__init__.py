"""What is trained of a model besides every weight: adapters, rows of new tokens, whole modules; and adapters of others."""
