"""Weights and gradients over several workers."""
