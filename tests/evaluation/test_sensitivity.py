"""What each part costs: variants that share a walk, against each measured alone, and the shares of the gap."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_tokens, tiny_model
from families import CPU, TOKENS, make_model, quantize, settings
from safetensors.torch import save_file
from torch import nn

from evaluation.base import FULL, QUANTIZED, Context
from evaluation.journal import Journal
from evaluation.measured import Measured
from evaluation.perplexity import Perplexity, final_hidden, score
from evaluation.runner import Runner, open_evaluations
from evaluation.sensitivity import Variants, gap_share, sensitivity_results, sensitivity_table, variant_parts
from evaluation.settings import EvaluationSettings, PerplexitySettings, SensitivitySettings
from models import decoder_spec
from quantize.bits import BitSettings
from quantize.observe import advance_, layer_calls
from quantize.observer import Observer
from quantize.quantization import Quantization
from quantize.settings import QuantSettings
from quantize.statistics import channel_statistics
from quantize.unrounded import Part, left_unrounded, rounded_part
from quantize.walk import layers_in_memory, walk
from utils.batching import BatchSize
from utils.errors import InputError

WINDOWS = random_tokens(3, 20, seed=5)
LAYERS = 3
BATCH = BatchSize(2)


class Weights(Observer):
    """The transformed weights of every layer, by path."""

    def __init__(self):
        self.layers: dict[int, dict] = {}
        self.now: dict = {}

    def rounding(self, group, path, linear):
        self.now[path] = linear.weight.detach()

    def layer_done(self, index, finished, restored):
        self.layers[index], self.now = self.now, {}


def walked(model: nn.Module, config: QuantSettings, finished=None) -> tuple[nn.Module, Variants, dict]:
    """A quantized copy, the variants that went through it while it was quantized, and all transformed weights."""
    model, kept = copy.deepcopy(model), Weights()
    spec = decoder_spec(model.config)
    peaks = channel_statistics(model, spec, TOKENS, CPU).scales
    variants = Variants(model, spec, WINDOWS, CPU, BATCH)
    quantization = Quantization(model, spec, TOKENS, peaks, config, CPU, finished, [variants, kept])
    layers = layers_in_memory(model, spec, CPU)
    walk(layers, [quantization, variants], len(spec.decoder_layers(model)))
    return model, variants, kept.layers


def alone(model: nn.Module, weights: dict, key: tuple) -> torch.Tensor:
    """What the last layer gives of the windows if one variant goes through all layers by itself."""
    spec = decoder_spec(model.config)
    calls = layer_calls(model, spec, WINDOWS, CPU)
    for index, layer in enumerate(spec.decoder_layers(model)):
        own = spec.at(index)
        part = variant_parts(index, own, rounded_part(layer, own)).get(key, Part())
        with left_unrounded(layer, own, part, weights[index]):
            advance_(layer, calls.hidden, calls.kwargs[index], CPU, BATCH)
    return calls.hidden


CASES = {
    "llama": (lambda: tiny_model(num_hidden_layers=LAYERS), LAYERS),
    "a mixture after a dense layer": (lambda: make_model("qwen3_moe, one dense layer"), 2),
    "groups of fused linears": (lambda: make_model("phi3"), 2),
}


@pytest.mark.parametrize("name", CASES)
def test_variants_that_share_a_walk_are_to_the_bit_those_that_go_alone(name):
    make, layers = CASES[name]
    model, variants, weights = walked(make(), settings())
    kinds = [kind for kind, _ in variants.hidden]
    assert {kind: kinds.count(kind) for kind in kinds} == {"roles": 5, "groups": 4, "layers": layers}
    for key, hidden in variants.hidden.items():
        assert torch.equal(hidden, alone(model, weights, key)), key
        assert not torch.equal(hidden, variants.quantized.hidden), key
    assert torch.equal(variants.quantized.hidden, alone(model, weights, ("no", "variant")))


def test_layers_from_a_checkpoint_have_the_same_variants():
    model = make_model("llama")
    _, finished = quantize(model, settings())
    _, expected, _ = walked(model, settings())
    for restored in ({0: finished[0]}, finished):
        _, found, _ = walked(model, settings(), restored)
        assert found.hidden.keys() == expected.hidden.keys()
        assert all(torch.equal(hidden, expected.hidden[key]) for key, hidden in found.hidden.items())


def test_what_is_not_rounded_has_no_variant():
    _, variants, _ = walked(make_model("llama"), replace(settings(), bits=BitSettings(16, 16, key=4)))
    assert list(variants.hidden) == [("roles", "key"), ("layers", 0), ("layers", 1)]


def test_no_layer_s_weights_outlive_its_visit():
    _, variants, _ = walked(make_model("llama"), settings())
    assert variants._weights == {}


@pytest.fixture
def runner(tmp_path):
    """Makes a runner of the evaluation, as a new process would."""
    save_file({"test": random_tokens(6, 12)}, tmp_path / "some.safetensors")
    model = tiny_model()
    context = Context(
        model="tiny",
        config=model.config,
        spec=decoder_spec(model.config),
        tokenizer=None,
        device=CPU,
        longest=64,
        seqlen=12,
        given_seqlen=None,
        seed=0,
        cache_dir=tmp_path,
    )

    def make(windows: int = 4, limit: int | None = None) -> Runner:
        which = PerplexitySettings(test_dataset=(str(tmp_path / "some.safetensors"),))
        asked = EvaluationSettings(limit, perplexity=which, sensitivity=SensitivitySettings(True, windows))
        journal = Journal(Path(tmp_path / "journal"), "tiny")
        return Runner(open_evaluations(asked, context), journal, tmp_path, "tiny", "tiny")

    return make


def measure(runner: Runner) -> tuple[Measured, nn.Module, nn.Module]:
    """What a run finds of a tiny model; the model in full precision, and quantized."""
    model, full, own = tiny_model(), Measured(), Measured()
    exact, spec, config = copy.deepcopy(model), decoder_spec(model.config), settings(smooth=None)
    compared = runner.for_comparison(shown=False)
    before, behind = compared.board(model, full, FULL), runner.board(model, own, QUANTIZED)
    quantization = Quantization(model, spec, TOKENS, None, config, CPU, None, [behind])
    walk(layers_in_memory(model, spec, CPU), [before, quantization, behind], 2)
    compared.measure(model, full, FULL, "full")
    runner.measure(model, own, QUANTIZED, "own")
    assert full.failures == own.failures == {}
    assert full.results["sensitivity"] == {}
    return own, exact, model


def test_the_quantized_and_the_full_model_are_measured_as_perplexity_measures_them(runner):
    own, exact, quantized = measure(runner())
    found, tokens = own.results["sensitivity"], random_tokens(6, 12)[:4]
    assert (found["dataset"], found["windows"], found["tokens_per_window"]) == ("some", 4, 12)
    spec = decoder_spec(exact.config)
    teacher, student = (final_hidden(model, spec, tokens, CPU, "test") for model in (exact, quantized))
    full, ours = score(exact, spec, tokens, teacher, CPU), score(quantized, spec, tokens, student, CPU, teacher)
    assert found["full_precision"]["nats"] == pytest.approx(full.nats, rel=1e-6)
    assert found["quantized"]["nats"] == pytest.approx(ours.nats, rel=1e-6)
    assert found["quantized"]["divergence"] == pytest.approx(ours.divergence, rel=1e-4)
    assert found["roles"].keys() == {"weight", "input", "query", "key", "value"}
    assert list(found["groups"]) == ["qkv", "o", "gate_up", "down"]
    assert [each["layer"] for each in found["layers"]] == [0, 1]


def test_the_states_that_travel_are_counted_before_they_do(runner):
    made = runner(windows=3)
    assert made.tokens(FULL) == 3 * 12
    assert made.tokens(QUANTIZED) == 3 * 12 * (1 + 5 + 4 + 2)
    assert made.evaluations.own_windows == (((3 * 10, 12),), ((3 * 2, 12),))
    assert made.evaluations.windows == ((3, 12),)
    assert runner(windows=5, limit=2).tokens(FULL) == 2 * 12
    assert runner(windows=100).tokens(FULL) == 6 * 12, "all there are"


def test_what_the_journal_has_is_not_measured_again_and_neither_is_the_full_model(runner):
    own, _, _ = measure(runner())
    again, found = runner(), Measured()
    assert (again.tokens(FULL), again.tokens(QUANTIZED)) == (0, 0)
    again.for_comparison(shown=False).measure(tiny_model(), Measured(), FULL, "full")
    again.measure(tiny_model(), found, QUANTIZED, "own")
    assert found.results == own.results
    assert runner(windows=3).tokens(QUANTIZED) > 0


def test_a_model_that_is_not_quantized_now_is_a_failure_with_a_reason(runner):
    made, found = runner(), Measured()
    made.for_comparison(shown=False).measure(tiny_model(), Measured(), FULL, "full")
    made.measure(tiny_model(), found, QUANTIZED, "own")
    assert "while the layers are quantized" in found.failures["sensitivity"]


def test_the_share_of_the_gap_is_of_log_perplexity():
    assert gap_share(2.0, quantized=3.0, full=1.0) == 0.5
    assert gap_share(1.0, quantized=3.0, full=1.0) == 1
    assert gap_share(3.5, quantized=3.0, full=1.0) == -0.25
    assert gap_share(0.9, quantized=1.0, full=1.0) is None, "there is no gap"
    assert gap_share(0.9, quantized=0.9, full=1.0) is None
    assert gap_share(1.0, quantized=math.inf, full=1.0) is None


def test_results_and_table_say_the_same_in_the_order_of_the_variants():
    def result(nats: float, divergence: float | None) -> Perplexity:
        return Perplexity(math.exp(nats), nats, 2, 9, divergence)

    variants = {("roles", "input"): result(2, 0.1), ("layers", 7): result(2.5, 0.3), ("groups", "o"): result(3.2, 0.4)}
    found = sensitivity_results("text", result(1, None), result(3, 0.4), variants)
    assert found["roles"]["input"]["share"] == 0.5
    assert found["roles"]["input"]["divergence_share"] == pytest.approx(0.75)
    assert found["layers"] == [
        {"layer": 7, "perplexity": math.exp(2.5), "nats": 2.5, "divergence": 0.3, "share": 0.25}
        | {"divergence_share": pytest.approx(0.25)}
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in sensitivity_table(found).splitlines()]
    assert [row[0] for row in rows[2:]] == ["nothing", "everything", "inputs of linears", "group o", "layer 7"]
    assert rows[4] == ["inputs of linears", "7.3891", "0.1000", "50.0 %", "75.0 %"]
    assert rows[5][3:] == ["-10.0 %", "0.0 %"]
    assert rows[3][2:] == ["–", "–", "–"]


def test_no_window_is_no_number_of_windows():
    with pytest.raises(InputError, match="--sensitivity_windows 0"):
        SensitivitySettings(True, 0)
