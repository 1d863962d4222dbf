"""The method: smoothing, rotation, permutation, quantizers, and the walk over decoder layers."""
