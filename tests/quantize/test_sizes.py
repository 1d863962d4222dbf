"""Bytes counted from shapes, against what is really made, and by hand."""

import math
from dataclasses import replace

import pytest
import torch
from best_settings import EXTRAS, best
from conftest import random_tokens, tiny_config, tiny_model

from models import decoder_spec
from models.load import load_skeleton
from models.saved import ModelWriter
from quantize.bits import BitSettings, ClipSettings, Format, FormatSettings
from quantize.observer import Observer
from quantize.quantization import Quantization, quantize_model
from quantize.refinements import Rounding, RoundingSettings
from quantize.rotation_settings import RotationSettings, Transform
from quantize.settings import GqaSmooth, QuantSettings, SmoothSettings, TrainingSettings
from quantize.sizes import (
    LAYER_FILE,
    checkpoint_bytes,
    codes_bytes,
    hidden_bytes,
    memory_footprint,
    packed_bytes,
    quantized_bytes,
    quantized_layer_bytes,
    sample_copies,
    state_bytes,
    transform_bytes,
)
from quantize.statistics import Observation, channel_statistics
from quantize.transforms import TRANSFORMS

CPU = torch.device("cpu")
ROTATION = RotationSettings(block_size=16, steps=2)
QUANT = QuantSettings(BitSettings(4, 4), smooth=SmoothSettings(0.5), rotation=ROTATION)
TRAINED = replace(QUANT, training=TrainingSettings(epochs=0))
SHAPES = [(96, 48), (32, 48), (32, 48), (48, 96), (80, 48), (80, 48), (48, 80)]  # of one layer of `tiny_config`
WEIGHTS, ROWS = sum(map(math.prod, SHAPES)), sum(rows for rows, _ in SHAPES)


def tiny():
    config = tiny_config()
    return load_skeleton(config), decoder_spec(config)


@pytest.mark.parametrize(
    ("transform", "times", "expected"),
    [
        (Transform.DUAL, 1, 2 * 32768 + 16384),
        (Transform.DUAL, 0, 32768),
        (Transform.DUAL, 3, 4 * 32768 + 3 * 16384),
        (Transform.ROTATION_PERMUTATION, 0, 2 * 32768 + 16384),
        (Transform.ROTATION, 1, 32768),
        (Transform.ROTATION, 3, 32768),
        (Transform.HADAMARD, 1, 32768),
        (Transform.PERMUTATION, 3, 2 * 32768 + 16384),
        (Transform.NONE, 1, 0),
    ],
)
def test_a_transform_of_4096_channels_in_blocks_of_128_takes_what_it_uses(transform, times, expected):
    settings = QuantSettings(transform=transform, rotation=RotationSettings(128, permutation_times=times))
    assert transform_bytes(4096, settings) == expected


@pytest.mark.parametrize("times", [0, 1, 3])
@pytest.mark.parametrize("transform", Transform)
def test_rotations_permutations_and_searches_are_those_that_the_builder_makes(transform, times):
    settings = QuantSettings(transform=transform, rotation=RotationSettings(8, 2, times))
    made = TRANSFORMS[transform](torch.randn(4, 32), 8, settings.rotation, torch.Generator().manual_seed(0))
    assert transform_bytes(32, settings, number=1, index=0) == made.rotations.numel()
    assert transform_bytes(32, settings, number=0, index=1) == made.permutations.numel()
    assert transform.searches(times) == len(made.steps)


def test_the_footprint_counts_codes_scales_zero_points_transforms_and_the_rest():
    model, spec = tiny()
    everything = sum(parameter.numel() for parameter in model.parameters())
    plain = replace(QUANT, smooth=None)
    found = memory_footprint(model, spec, plain)
    assert found["float16_bytes"] == 2 * everything
    assert found["linears_bytes"] == 2 * (WEIGHTS / 2 + ROWS / 2 + 2 * ROWS)
    assert found["transforms_bytes"] == 2 * (4 * 2 * 2 * 16 * 16 + 4 * (48 + 96 + 48 + 80))
    assert found["rest_bytes"] == 2 * (everything - 2 * WEIGHTS)
    assert found["quantized_bytes"] == sum(found[f"{part}_bytes"] for part in ("linears", "transforms", "rest"))
    assert found["ratio"] == found["float16_bytes"] / found["quantized_bytes"]
    hadamard = memory_footprint(model, spec, replace(plain, transform=Transform.HADAMARD))
    assert hadamard["transforms_bytes"] == 2 * 4 * 2 * 16 * 16
    online, folded = (
        memory_footprint(model, spec, replace(QUANT, smooth=SmoothSettings(gqa=gqa)))["transforms_bytes"]
        for gqa in GqaSmooth
    )
    shifted = memory_footprint(model, spec, replace(plain, extras=EXTRAS["channel shift"]))
    assert shifted["transforms_bytes"] - found["transforms_bytes"] == 2 * 2 * (48 + 96 + 48 + 80)
    assert shifted["rest_bytes"] - found["rest_bytes"] == 2 * 2 * ROWS
    balanced = memory_footprint(model, spec, replace(plain, extras=EXTRAS["balanced heads"]))
    assert balanced["transforms_bytes"] - found["transforms_bytes"] == 2 * 2 * 2 * 2 * 16 * 16
    assert (online - found["transforms_bytes"], folded) == (2 * 2 * 96, found["transforms_bytes"])


def test_the_footprint_follows_the_scheme_of_weights_alone():
    model, spec = tiny()
    bare = replace(QUANT, smooth=None, transform=Transform.NONE)
    grouped = memory_footprint(model, spec, replace(bare, bits=BitSettings(3, 4, group_size=16, symmetric=True)))
    assert grouped["linears_bytes"] == 2 * (WEIGHTS * 3 / 8 + 2 * WEIGHTS / 16)
    roles = BitSettings(4, 8, query=6, key=2, value=16, act_group_size=16, act_symmetric=True)
    assert memory_footprint(model, spec, replace(bare, bits=roles)) == memory_footprint(model, spec, bare)
    floats = memory_footprint(model, spec, replace(bare, bits=BitSettings(16, 4)))
    assert floats["quantized_bytes"] == floats["float16_bytes"]


def test_one_weight_packed_and_as_it_is_held():
    four, grouped = (BitSettings(4, 16, group_size=size) for size in (None, 8))
    symmetric, ten, sixteen = BitSettings(3, 16, symmetric=True), BitSettings(10, 16), BitSettings(16, 4)
    schemes = [QuantSettings(bits).scheme.weight for bits in (four, grouped, symmetric, ten, sixteen)]
    assert [packed_bytes(6, 16, each) for each in schemes] == [48 + 3 + 12, 48 + 6 + 24, 36 + 12, 128 + 12, 192]
    held = [codes_bytes(6, 16, each, torch.bfloat16) for each in schemes]
    assert held == [48 + 48, 48 + 96, 48 + 48, 192 + 48, 192]


CASES = {
    "dual": QUANT,
    "folded": replace(QUANT, smooth=SmoothSettings(gqa=GqaSmooth.FOLD)),
    "rotation": replace(QUANT, transform=Transform.ROTATION, smooth=None),
    "hadamard, auto": replace(QUANT, transform=Transform.HADAMARD, rotation=RotationSettings(None)),
    "permutation": replace(QUANT, transform=Transform.PERMUTATION),
    "none": replace(QUANT, transform=Transform.NONE),
    "three permutations": replace(QUANT, rotation=replace(ROTATION, permutation_times=3)),
    "groups": replace(QUANT, bits=BitSettings(4, 4, group_size=16)),
    "blocks": replace(QUANT, formats=FormatSettings(Format.NVFP4, Format.NVFP4)),
    "blocks by samples": best(formats=FormatSettings(Format.NVFP4, Format.NVFP4)),
    "ten bits": replace(QUANT, bits=BitSettings(10, 4)),
    "weights left alone": replace(QUANT, bits=BitSettings(16, 4)),
    "trained": TRAINED,
    "best": best(),
    "best, ten bits": best(10, GqaSmooth.FOLD, extras=EXTRAS["all"]),
    "best, groups": best(bits=BitSettings(3, 4, group_size=16)),
    "best, trained": best(clip=ClipSettings("search"), training=TrainingSettings(epochs=0)),
    "shift, weights alone": replace(QUANT, bits=BitSettings(4, 16), extras=EXTRAS["all"]),
    "means and clips": replace(QUANT, clip=ClipSettings("search"), extras=EXTRAS["key mean"]),
    "values": replace(QUANT, transform=Transform.NONE, extras=EXTRAS["value rotation"], smooth=None),
    "gptq of inputs alone": best(bits=BitSettings(16, 4)),
    "trained groups": replace(TRAINED, bits=BitSettings(4, 4, group_size=16)),
    "trained without weights": replace(TRAINED, bits=BitSettings(16, 4)),
}


class States(Observer):
    """Keeps what every layer's state would write."""

    def __init__(self):
        self.bytes = []

    def layer_done(self, index, finished, restored):
        self.bytes.append(sum(tensor.nbytes for tensor in finished.state.tensors().values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_states_layers_and_saved_models_have_the_bytes_that_were_counted(settings, dtype, tmp_path):
    model, (skeleton, spec) = tiny_model(dtype), tiny()
    tokens, states = random_tokens(4, 16), States()
    peaks = channel_statistics(model, spec, tokens, CPU).scales if settings.smooth else None
    quantize_model(model, spec, tokens, peaks, settings, CPU, observers=[states])
    expected = [state_bytes(layer, spec, settings) for layer in spec.decoder_layers(skeleton)]
    assert states.bytes == expected
    assert checkpoint_bytes(skeleton, spec, settings) == sum(expected) + 2 * LAYER_FILE
    with ModelWriter(tmp_path / "saved", spec, 2) as writer:
        layers = 0
        for index, layer in enumerate(spec.decoder_layers(model)):
            writer.visit(index, layer)
            layers += quantized_layer_bytes(spec.decoder_layers(skeleton)[index], spec, settings, dtype)
            assert writer.bytes == layers
    shell = sum(tensor.nbytes for name, tensor in model.named_parameters() if not name.startswith(spec.layers))
    assert quantized_bytes(skeleton, spec, settings, dtype) == layers + shell


def test_nothing_is_kept_of_a_model_that_is_not_quantized():
    skeleton, spec = tiny()
    untouched = replace(QUANT, bits=BitSettings(16, 16))
    assert checkpoint_bytes(skeleton, spec, untouched) == 0
    assert (
        quantized_bytes(skeleton, spec, untouched, torch.float16)
        == memory_footprint(skeleton, spec, untouched)["float16_bytes"]
    )


@pytest.mark.parametrize(
    "settings",
    [QUANT, TRAINED, best(), replace(best(), rounding=RoundingSettings(Rounding.GPTQ))],
    ids=["searched", "trained", "best", "best without target"],
)
def test_hidden_states_of_samples_are_allocated_as_often_as_counted(settings):
    model, (skeleton, spec) = tiny_model(), tiny()
    tokens, asked = random_tokens(4, 16), []

    def allocate(shape, dtype):
        asked.append(torch.empty(tuple(shape), dtype=dtype))
        return asked[-1]

    observation = Observation(model, spec, tokens, CPU, allocate)
    Quantization(model, spec, tokens, observation.statistics.scales, settings, CPU, allocate=allocate)
    copies = sample_copies(settings, statistics=True)
    assert sum(each.nbytes for each in asked) == hidden_bytes(copies * tokens.numel(), skeleton, torch.float32)
    assert sample_copies(settings, statistics=False) == copies - 1
    assert sample_copies(replace(settings, bits=BitSettings(16, 16)), statistics=True) == 0
