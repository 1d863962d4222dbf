"""What goes between host and GPU, without a GPU: copies, launches and waits of every stage, for models of true shapes.

    python benchmarks/device_traffic.py
    python benchmarks/device_traffic.py --shapes mistral-7b --dtype bfloat16

The suite's own code runs on tensors without content (`tools/fake_device.py`, which says what is counted), so a 70B
model needs no memory: W4A4, smoothing, blocks of 128, one walk over the layers. Weights and hidden states stay where
main.py would have them with `--free_memory` on the device; their way there at the beginning is not counted. Models of
one and of two layers are run; their difference is what each further layer adds, and with it they are scaled up to the
model's own layers. Search is a part of quantization; it takes `--steps` greedy steps and twice as many, and is scaled
up to 256 in the same way. Training, which is what `--lwc` adds to quantization, is run on few samples for one and two
epochs, and scaled up to `--nsamples` and 20 epochs. What depends on the activations is as `FakeDevice` answers it.
"""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.perplexity import Windows, score
from experiment.estimate import Plan, estimate
from experiment.options import Keep
from experiment.residence import choose_residence
from models import decoder_spec
from models.load import load_skeleton
from models.zoo import SHAPES, zoo_config
from quantize import layer
from quantize.bits import BitSettings, ClipSettings
from quantize.quantization import Quantization
from quantize.rotation_settings import RotationSettings
from quantize.settings import QuantSettings, SmoothSettings, TrainingSettings
from quantize.statistics import Observation
from quantize.walk import layers_in_memory, walk
from tools.fake_device import Traffic, fake_device
from utils.batching import BatchSize
from utils.device import DTYPES, home_of
from utils.memory import memory_of
from utils.results import format_table

GB = 1e9
EVERYTHING = "all but training"
EPOCHS, STEPS = 20, 256  # what training and search are scaled up to
FEW = 4  # samples that are trained on


def settings(steps: int, epochs: int = 0) -> QuantSettings:
    """The paper's settings with `steps` greedy steps; the clipping is trained if there are `epochs`."""
    clip = ClipSettings(0.9, None if epochs else 0.8)
    rotation, training = RotationSettings(steps=steps), TrainingSettings(epochs=epochs) if epochs else None
    return QuantSettings(BitSettings(4, 4), clip, SmoothSettings(0.6), rotation=rotation, training=training)


def stages(
    args: argparse.Namespace, shape: str, layers: int, samples: int, windows: int, config: QuantSettings
) -> dict[str, Traffic]:
    """The traffic by stage of a model of `layers` layers, calibrated on `samples` and measured on `windows`, if any.

    One walk, as main.py's. What stays on the device is what would of the model with all its layers.
    """
    whole, dtype = zoo_config(shape), DTYPES[args.dtype]
    plan = Plan(dtype, True, (args.nsamples, args.seqlen), ((args.windows, args.seqlen),))
    needed = estimate(load_skeleton(whole), decoder_spec(whole), settings(STEPS), plan)
    kept = choose_residence(Keep(args.keep), needed, int(args.free_memory * GB), whole=True)
    with fake_device(int(args.free_memory * GB)) as gpu:
        model = AutoModelForCausalLM.from_config(zoo_config(shape, layers), dtype=dtype)
        model = model.eval().requires_grad_(False).to(gpu.device if kept.weights else "cpu")
        spec = decoder_spec(model.config)
        tokens, test = (torch.zeros(count, args.seqlen, dtype=torch.int64) for count in (samples, windows))
        allocate = memory_of(gpu.device) if kept.states else None
        parts = [
            (layer, "search_transform", "of which search"),
            (layer, "train_clipping_", "training"),
            (Observation, "visit", "statistics"),
            (Quantization, "visit", "quantization"),
            (Windows, "visit", "perplexity"),
        ]
        with ExitStack() as stack, gpu.stage(EVERYTHING):
            for part in parts:
                stack.enter_context(gpu.staged(*part))
            observation = Observation(model, spec, tokens, gpu.device, allocate)
            peaks = observation.statistics.scales
            how = (peaks, config, gpu.device, None, (), allocate or memory_of(home_of(model)))
            passengers = [observation, Quantization(model, spec, tokens, *how)]
            batch = BatchSize.choose(None, args.seqlen, gpu.device)
            passengers += [Windows(model, spec, test, gpu.device, batch, allocate)] if windows else []
            walk(layers_in_memory(model, spec, gpu.device), passengers, layers)
            if windows:
                score(model, spec, test, passengers[-1].hidden, gpu.device)
    return gpu.stages


def extended(first: Traffic, second: Traffic, count: int) -> Traffic:
    """What `count` of something cost, when one costs `first` and two `second`."""
    return first + (second - first) * (count - 1)


def row(name: str, each: Traffic, whole: Traffic) -> list[str]:
    """One line of the table."""
    return [
        name,
        f"{each.bytes_to_device / GB:.2f}",
        f"{each.bytes_to_host / GB:.2f}",
        *(f"{count:,}" for count in (each.copies_to_device, each.copies_to_host, each.launches, each.waits)),
        f"{whole.bytes_to_device / GB:.0f}",
        f"{whole.bytes_to_host / GB:.0f}",
        f"{whole.launches:,}",
        f"{whole.waits:,}",
        f"{whole.bytes_held / GB:.0f}",
    ]


def trained(args: argparse.Namespace, shape: str) -> Traffic:
    """Of training one layer, which grows with the samples, and with every epoch over them."""

    def training(samples: int, epochs: int) -> Traffic:
        return stages(args, shape, 1, samples, 0, settings(1, epochs))["training"]

    # one epoch is its own best: from two on there is one more pass, over the samples with the best logits at rest
    few, many, longer = training(FEW, 2), training(2 * FEW, 2), training(FEW, 3)
    parts = args.nsamples // FEW
    return extended(few, many, parts) + (longer - few) * parts * (EPOCHS - 2)


def table(args: argparse.Namespace, shape: str) -> str:
    """The stages of one model."""
    total = zoo_config(shape).num_hidden_layers
    one, two = (stages(args, shape, layers, args.nsamples, args.windows, settings(args.steps)) for layers in (1, 2))
    longer = stages(args, shape, 1, args.nsamples, 0, settings(2 * args.steps))
    rows = []
    for name in ("statistics", "quantization", "of which search", "perplexity", EVERYTHING):
        searching = "quantization" if name == EVERYTHING else name
        # steps, in every layer
        more = (longer.get(searching, one[searching]) - one[searching]) * (STEPS // args.steps - 1)
        each, whole = two[name] - one[name] + more, extended(one[name], two[name], total) + more * total
        rows.append(row(name, each, whole))
    training = trained(args, shape)
    rows.insert(3, row("training", training, training * total))
    columns = ["GB to device", "GB to host", "copies", "back", "launches", "waits"]
    return format_table(
        [f"{shape}: one layer", *columns, f"{total}: GB to", "GB back", "launches", "waits", "GB held"], rows
    )


def main() -> None:
    """Print a table for every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["llama-2-7b", "llama-2-70b"])
    parser.add_argument("--dtype", choices=list(DTYPES), default="float16")
    parser.add_argument("--nsamples", type=int, default=128, help=f"a multiple of {FEW}")
    parser.add_argument("--windows", type=int, default=341, help="test windows: WikiText-2 has 341 of 2048 tokens")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument(
        "--steps", type=int, default=16, help=f"greedy steps that are taken: a divisor of {STEPS}, at least 16"
    )
    parser.add_argument("--keep", choices=list(Keep), default=Keep.AUTO, help="as main.py's")
    parser.add_argument("--free_memory", type=float, default=80.0, help="GB that the device has free")
    args = parser.parse_args()
    for shape in args.shapes:
        print(table(args, shape), flush=True)
        print()


if __name__ == "__main__":
    main()
