"""What cannot be told to other engines is refused, before anything is computed, with the flag to change."""

from types import SimpleNamespace

import pytest
from families import CASES, make_config
from script_cases import settings_of

from experiment.export import check_export, problems
from experiment.verify import judged
from models import decoder_spec
from models.load import load_skeleton
from quantize.settings import QuantSettings
from utils.errors import InputError

RIGHT = ("--wbits", 4, "--abits", 4, "--qbits", 16, "--kbits", 16, "--vbits", 16, "--symmetric", "--act_symmetric")
RIGHT += ("--symmetric_range", "full", "--smooth", "--gqa_smooth", "fold", "--transform", "permute_rotate")
BLOCKS = ("--no_symmetric", "--no_act_symmetric")
REFUSED = [
    (("--wbits", 3), "weights have 3 bits; give --wbits 4"),
    (("--wbits", 16), "weights have 16 bits; give --wbits 4"),
    (("--no_symmetric",), "give --symmetric"),
    (("--symmetric_range", "restricted"), "give --symmetric_range full"),
    (("--no_act_symmetric",), "give --act_symmetric"),
    (("--kbits", 8), "q, k and v are not rounded there; give --kbits 16"),
    (("--qbits", 4, "--vbits", 4), "give --qbits 16 --vbits 16"),
    (("--abits", 5), "inputs have 5 bits; give --abits 4, 8, 16"),
    (("--act_group_size", 16), "drop --act_group_size 16"),
    (("--lac", 0.9), "give --lac none in place of --lac 0.9"),
    (("--lac", "search"), "give --lac none in place of --lac search"),
    (("--train", "transform"), "give --fixed_input_clips"),
    (("--channel_shift",), "give --no_channel_shift"),
    (("--transform", "dual"), "--transform dual permutes activations when it runs; give --transform permute_rotate"),
    (("--transform", "two_hadamard"), "--transform two_hadamard permutes activations"),
    (("--transform", "permutation"), "--transform permutation permutes activations"),
    (
        (*BLOCKS, "--wformat", "mxint4", "--aformat", "mxint4"),
        "no engine knows mxint4; give --wformat int, mxfp4, nvfp4",
    ),
    ((*BLOCKS, "--wformat", "mxfp4"), "inputs have the format of weights there; give --aformat mxfp4"),
    ((*BLOCKS, "--wformat", "mxfp4", "--aformat", "mxfp4"), "give --lac 1.1428571428571428"),
    ((*BLOCKS, "--wformat", "nvfp4", "--aformat", "nvfp4", "--lac", 1.1), "give --lac none"),
    (("--gqa_smooth", "online"), "the smoothing scale of self_attn.o_proj is applied when it runs; give --gqa_smooth"),
]
ACCEPTED = [
    (),
    ("--abits", 8),
    ("--abits", 16, "--lac", 0.9, "--channel_shift", "--no_act_symmetric"),
    ("--value_rotation", "--swc", "search", "--rounding", "gptq", "--group_size", 16),
    ("--train", "transform", "--fixed_input_clips"),
    ("--lwc", "--transform", "hadamard"),
    ("--no_smooth", "--transform", "none"),
    (*BLOCKS, "--wformat", "mxfp4", "--aformat", "mxfp4", "--lac", "1.1428571428571428"),
    (*BLOCKS, "--wformat", "nvfp4", "--aformat", "nvfp4"),
    (*BLOCKS, "--wformat", "nvfp4", "--abits", 16),
]


def setup_of(name: str) -> SimpleNamespace:
    config = make_config(name)
    return SimpleNamespace(config=config, spec=decoder_spec(config), skeleton=load_skeleton(config), saved=None)


def found(name: str, *flags: object) -> list[str]:
    return list(problems(setup_of(name), settings_of(*RIGHT, *flags).quant))


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=lambda each: " ".join(map(str, each[:2])))
def test_what_cannot_be_told_is_refused_with_what_to_do(flags, message):
    assert message in found("llama", *flags)[0]


@pytest.mark.parametrize("flags", ACCEPTED, ids=lambda each: " ".join(map(str, each)))
def test_what_can_be_told_is_not(flags):
    assert found("llama", *flags) == []


@pytest.mark.parametrize("name", CASES)
def test_families_are_refused_for_what_their_linears_are(name):
    told = found(name)
    reasons = {"qwen2": "has a bias", "qwen3": "has a bias", "olmo2": "give --no_smooth", "mix": "mixtures of experts"}
    reasons["qwen3_moe"] = "mixtures of experts"
    expected = next((reasons[start] for start in sorted(reasons, key=len)[::-1] if name.startswith(start)), None)
    assert (told == []) is (expected is None)
    assert expected is None or any(expected in each for each in told)


def test_presets_are_refused_by_the_first_thing_they_have():
    quant = settings_of("--preset", "best").quant
    assert isinstance(quant, QuantSettings)
    with pytest.raises(InputError, match="--export: asymmetric weights"):
        check_export(settings_of("--preset", "best", "--export", "nowhere"), setup_of("llama"), quant)


def test_verifying_needs_an_export_and_a_perplexity_to_compare():
    for flags, message in ((("--verify",), "add --export"), (("--verify", "--export", "nowhere"), "add --eval_ppl")):
        settings = settings_of(*RIGHT, *flags)
        with pytest.raises(InputError, match=message):
            check_export(settings, setup_of("llama"), settings.quant)


RESULT = {"difference": 0.0, "levels": 16, "perplexity": [10.0]}


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, set()),
        ({"difference": 0.01}, {"logits"}),
        ({"difference": float("nan")}, {"logits"}),
        ({"levels": 17}, {"levels"}),
        ({"perplexity": [10.011]}, {"perplexity text"}),
        ({"perplexity": [float("nan")]}, {"perplexity text"}),
        ({"perplexity": [10.009]}, set()),
    ],
)
def test_what_is_not_as_it_was_is_named(change, wrong):
    found, said = judged({**RESULT, **change}, [10.0], settings_of(*RIGHT).quant, ["text"], 1e-3)
    assert set(found) == wrong
    assert "at most" in said
