"""Layers: quantizers inside a running model, at linear inputs, in attention and in the KV cache."""
