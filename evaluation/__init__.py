"""Measurements on a model, quantized or not."""
