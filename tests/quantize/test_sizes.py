"""How much memory a model takes at the bits it is quantized to."""

import math
from dataclasses import replace

from conftest import tiny_model

from models import decoder_spec
from quantize.settings import BitSettings, QuantSettings, RotationSettings, SmoothSettings, Transform
from quantize.sizes import memory_footprint


def test_the_footprint_counts_codes_scales_zero_points_transforms_and_the_rest():
    model = tiny_model()
    everything = sum(parameter.numel() for parameter in model.parameters())
    spec = decoder_spec(model.config)
    shapes = [(96, 48), (32, 48), (32, 48), (48, 96), (80, 48), (80, 48), (48, 80)]
    weights, ranges = (2 * sum(count(shape) for shape in shapes) for count in (math.prod, lambda shape: shape[0]))
    config = QuantSettings(BitSettings(4, 4), rotation=RotationSettings(16, 1))
    found = memory_footprint(model, spec, config)
    assert found["float16_bytes"] == 2 * everything
    assert found["linears_bytes"] == weights / 2 + ranges / 2 + 2 * ranges
    assert found["transforms_bytes"] == 2 * (4 * 2 * 2 * 16 * 16 + 4 * (48 + 96 + 48 + 80))
    assert found["rest_bytes"] == 2 * (everything - weights)
    assert found["quantized_bytes"] == sum(found[f"{part}_bytes"] for part in ("linears", "transforms", "rest"))
    grouped = memory_footprint(model, spec, QuantSettings(BitSettings(3, 4, 16, True), transform=Transform.NONE))
    assert grouped["linears_bytes"] == weights * 3 / 8 + 2 * weights / 16
    assert grouped["transforms_bytes"] == 0
    online = memory_footprint(model, spec, replace(config, smooth=SmoothSettings()))
    assert online["transforms_bytes"] - found["transforms_bytes"] == 2 * 2 * 96  # o_proj's, under GQA
