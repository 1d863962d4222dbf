"""Qwen3: Llama's decoder layer with a norm on every head of q and k, which is behind their linears.

It absorbs nothing: v and o have no part in it.
"""

from models.llama import llama_spec

qwen3_spec = llama_spec
