"""The arithmetic of quantized linears on codes, for each device."""
