"""The Helm chart's side of the package: what its scripts do, and the schema of its values."""
