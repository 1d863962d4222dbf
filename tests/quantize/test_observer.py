"""Looking on changes nothing, and the method knows nobody who does."""

import ast

import pytest
import torch
from conftest import ROOT, random_tokens, tiny_model

from models import decoder_spec
from quantize.bits import BitSettings, ClipSettings
from quantize.observer import Observer
from quantize.quantization import quantize_model
from quantize.rotation_settings import RotationSettings
from quantize.settings import QuantSettings, SmoothSettings, TrainingSettings
from quantize.statistics import channel_statistics
from reporting.recorder import Recorder

CPU = torch.device("cpu")
TOKENS = random_tokens(4, 24)
CONFIG = QuantSettings(BitSettings(4, 4), ClipSettings(0.9), SmoothSettings(), rotation=RotationSettings(16, 8))


class Noting(Observer):
    """Writes down what it is told, in order."""

    def __init__(self):
        self.told = []

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name in vars(Observer) and not name.startswith("_"):
            self.told.append((name, None))
        return found

    def layer_done(self, index, finished, restored):
        self.told[-1] = ("layer_done", (index, restored))


def quantize(observers, config: QuantSettings = CONFIG, finished=None):
    model = tiny_model()
    spec = decoder_spec(model.config)
    peaks = channel_statistics(model, spec, TOKENS, CPU).scales
    return model, quantize_model(model, spec, TOKENS, peaks, config, CPU, finished, observers)


@pytest.mark.parametrize("training", [None, TrainingSettings(epochs=2)], ids=["nearest", "trained"])
@pytest.mark.parametrize("who", ["nobody does anything", "a recorder", "several"])
def test_observers_leave_the_codes_and_the_figures_as_they_are(who, training, tmp_path):
    config = QuantSettings(CONFIG.bits, CONFIG.clip, CONFIG.smooth, rotation=CONFIG.rotation, training=training)
    observers = {
        "nobody does anything": [Observer()],
        "a recorder": [Recorder(tmp_path)],
        "several": [Noting(), Recorder(tmp_path), Observer()],
    }[who]
    (plain, expected), (model, figures) = quantize([], config), quantize(observers, config)
    state = plain.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for one, other in zip(figures, expected, strict=True):
        assert {name: one[name] for name in ("layer", "output_error", "groups")} == {
            name: other[name] for name in ("layer", "output_error", "groups")
        }


def test_an_observer_is_told_of_every_step_in_order():
    noting = Noting()
    quantize([noting])
    of_group = {"qkv": 3, "o": 1, "gate_up": 2, "down": 1}
    layer = ["layer_begins"]
    for linears in of_group.values():
        layer += ["searched", *["rounding"] * linears, "group_built"]
    layer += ["layer_built", "layer_done"]
    assert [name for name, _ in noting.told] == ["samples", *layer, *layer]
    assert [what for name, what in noting.told if name == "layer_done"] == [(0, False), (1, False)]


def test_a_layer_that_is_restored_is_told_as_such():
    class Keeping(Observer):
        layers = {}  # noqa: RUF012

        def layer_done(self, index, finished, restored):
            self.layers[index] = finished

    keeping, noting = Keeping(), Noting()
    quantize([keeping])
    quantize([noting], finished={0: keeping.layers[0]})
    names = [name for name, _ in noting.told]
    assert names[:11] == ["samples", *["rounding"] * 7, "layer_restored", "layer_done", "layer_begins"]
    assert [what for name, what in noting.told if name == "layer_done"] == [(0, True), (1, False)]


def test_what_an_observer_adds_is_in_the_figures_of_the_layer():
    class Adding(Observer):
        def layer_built(self, layer, kwargs):
            return {"colour": "red"}

    _, figures = quantize([Adding()])
    assert [layer["colour"] for layer in figures] == ["red", "red"]


def test_the_method_knows_no_recorder_and_nothing_above_it():
    """Imports go down: what looks on is above, and is nowhere named."""
    for path in sorted((ROOT / "quantize").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert "recorder" not in text.lower(), path.name
        imported = {name.split(".")[0] for name in imports(text)}
        assert not imported & {"models", "evaluation", "reporting", "experiment", "tools"}, path.name


def imports(text: str) -> list[str]:
    """Names of all modules that a file imports."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module)
    return found
