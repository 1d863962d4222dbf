"""Mistral: Llama's decoder layer with GQA; its sliding window is a mask, which the method does not touch."""

from models.llama import llama_spec

mistral_spec = llama_spec
