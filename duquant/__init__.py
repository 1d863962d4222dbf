"""What a quantized model is: number formats, codes, transforms that are applied, linears, attention.

Everything here runs wherever a quantized model runs, and needs torch, transformers and safetensors only. How a model
comes to be quantized is `quantize`'s matter. Importing it tells transformers how such a model is loaded.
"""

from duquant.hub import DuQuantConfig

__all__ = ["DuQuantConfig"]
