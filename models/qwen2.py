"""Qwen2 and Qwen2.5: Llama's decoder layer with biases on q, k and v. Smoothing folds v's bias with its rows."""

from models.llama import llama_spec

qwen2_spec = llama_spec
