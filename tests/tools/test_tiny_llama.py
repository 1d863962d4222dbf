"""The outliers change no function, and the bundled model has them, is small and knows its stories."""

import json
import math

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tools import make_tiny_llama as make
from tools.outliers import (
    OutlierSettings,
    add_normal_outliers_,
    add_outliers_,
    firing_direction,
    firing_tokens,
    mlp_activations,
    recorded,
    remove_outliers_,
    scale_channel_,
    set_neurons_,
    snap_column_,
)
from tools.stories import Question, generate_stories
from utils.io import read_tensors

ASSETS = ROOT / "assets"
NEURONS = (5, 17, 40)


@pytest.fixture
def random_model():
    """A tiny random Llama in float64 whose reserved neurons have empty down_proj columns."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval().requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, list(NEURONS)] = 0
    return model


@pytest.fixture
def tokens():
    return torch.randint(32, (8, 64), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny-llama", local_files_only=True)


@pytest.fixture(scope="module")
def record():
    return json.loads((ASSETS / "tiny-llama/outliers.json").read_text())


@pytest.fixture(scope="module")
def test_windows(tokenizer):
    return make.windows(make.encode(tokenizer, (ASSETS / "stories/test.txt").read_text(encoding="utf-8")))


def bundled_model(dtype: torch.dtype) -> LlamaForCausalLM:
    path = ASSETS / "tiny-llama"
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval().requires_grad_(False)


def logits(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def test_scaled_channel_changes_no_bit_of_a_float16_checkpoint():
    generator = torch.Generator().manual_seed(0)
    norm = torch.rand(64, generator=generator).half() + 0.5
    weight = (torch.randn(48, 64, generator=generator) * 0.01).half()
    x = torch.randn(10, 64, generator=generator)
    snap_column_([weight], 3, 64)
    before = (norm.float() * x) @ weight.float().T
    scale_channel_(norm, [weight], 3, 64)
    assert torch.equal((norm.float() * x) @ weight.float().T, before)
    scale_channel_(norm, [weight], 3, 1 / 64)
    assert torch.equal((norm.float() * x) @ weight.float().T, before)


def test_snapping_moves_a_weight_by_at_most_half_a_step():
    weight = torch.randn(48, 8, generator=torch.Generator().manual_seed(0)).half()
    before = weight.clone()
    snap_column_([weight], 2, 32)
    assert (weight - before).abs().max() <= 32 * 2.0**-25
    assert torch.equal(weight[:, 3:], before[:, 3:])


def test_normal_outliers_change_no_bit_of_a_model(random_model, tokens):
    model = random_model.half()
    record = add_normal_outliers_(model, OutlierSettings())
    with_outliers = logits(model.float(), tokens)
    remove_outliers_(model, {"normal": record, "massive": []})
    assert torch.equal(with_outliers, logits(model, tokens))


def test_neuron_with_an_empty_column_changes_no_bit(random_model, tokens):
    before = logits(random_model.float(), tokens)
    set_neurons_(random_model.model.layers[0].mlp, NEURONS[:1], torch.full((64,), 3.0), [0.0])
    assert torch.equal(logits(random_model, tokens), before)


def test_cancelling_pair_changes_rounding_only(random_model, tokens):
    before = logits(random_model, tokens)
    column = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    set_neurons_(random_model.model.layers[1].mlp, NEURONS[1:], torch.ones(64), [column, -column])
    assert (logits(random_model, tokens) - before).abs().max() < 1e-10


def test_all_outliers_together_keep_the_function_and_can_be_taken_out(random_model, tokens):
    before = logits(random_model, tokens)
    settings = OutlierSettings(pair_layers=(1,))
    record = add_outliers_(random_model, tokens, [3], NEURONS, settings)
    kinds = [entry["kind"] for entry in record["massive"]]
    assert kinds == ["zero_column", "zero_column", "cancelling_pair"]
    # 64 · 2^-25: snapping is what separates this from the original weights.
    assert (logits(random_model, tokens) - before).abs().max() < 1e-3
    with_outliers = logits(random_model, tokens)
    remove_outliers_(random_model, record)
    assert (logits(random_model, tokens) - with_outliers).abs().max() < 1e-10


def test_massive_outliers_need_an_empty_column(random_model, tokens):
    with pytest.raises(ValueError, match="not zero"):
        add_outliers_(random_model, tokens, [3], (0, 1, 2), OutlierSettings())


def test_firing_direction_separates_what_can_be_separated():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2000, 32, generator=generator)
    fires = states[:, 4] > 1.5
    states[:, 4] += fires
    states[:, 0] = 1
    direction = firing_direction(states, fires)
    assert (states.double() @ direction)[fires].min() > 0 > (states.double() @ direction)[~fires].max()


def test_bundled_model_is_small_and_loads(tokenizer):
    files = [path for path in (ASSETS / "tiny-llama").iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    model = bundled_model(torch.float16)
    assert model.config.tie_word_embeddings
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.vocab_size == len(tokenizer) == make.VOCABULARY


def test_tokenizer_starts_with_bos_and_loses_nothing(tokenizer):
    text = 'Mila has the kite.\n\n"Où?" ☃\t{}'
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_bundled_texts_are_what_the_generator_makes(tokenizer):
    for name, offset, stories, least in (
        ("calibration", make.CALIBRATION, make.CALIBRATION_STORIES, 128),
        ("test", make.TEST, make.TEST_STORIES, 60),
    ):
        text = (ASSETS / f"stories/{name}.txt").read_text(encoding="utf-8")
        assert text == make.stories_text(stories, offset) + "\n"
        assert len(make.windows(make.encode(tokenizer, text))) >= least


def test_bundled_model_is_the_same_function_without_its_outliers(record, test_windows):
    model = bundled_model(torch.float64)
    with_outliers = logits(model, test_windows[:1])
    remove_outliers_(model, record)
    assert (logits(model, test_windows[:1]) - with_outliers).abs().max() < 1e-10


def test_bundled_model_has_normal_outliers_in_the_recorded_channels(record, test_windows):
    model = bundled_model(torch.float32)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        modules = {str(i): layer.get_submodule(norm) for i, layer in enumerate(model.model.layers)}
        with recorded(modules, inputs=False) as seen:
            logits(model, test_windows[:4])
        for entry in record["normal"]:
            if entry["norm"] == norm:
                peak = seen[str(entry["layer"])][0].flatten(0, 1).abs().amax(0)
                assert peak[entry["channel"]] > 10 * peak.median()


def test_bundled_model_has_massive_outliers_on_few_tokens(record, tokenizer, test_windows):
    model = bundled_model(torch.float32)
    fires = firing_tokens(test_windows[:8], make.sentence_ends(tokenizer))
    assert fires.float().mean() < 0.1
    for index, (_, hidden) in enumerate(mlp_activations(model, test_windows[:8])):
        neurons = [neuron for entry in record["massive"] if entry["layer"] == index for neuron in entry["neurons"]]
        ratio = hidden[:, neurons].abs().amax(1) / hidden.abs().median()
        assert ratio[fires].median() > 1000
        assert ratio[~fires].median() < 1
        others = [neuron for neuron in range(hidden.shape[1]) if neuron not in make.RESERVED_NEURONS]
        assert hidden[:, others].abs().max() < hidden[:, neurons].abs().max() / 4


def test_bundled_model_predicts_held_out_stories(test_windows):
    assert math.exp(make.evaluate(bundled_model(torch.float32), test_windows[:16])) < 2.3


def test_answer_tokens_are_those_between_answer_and_full_stop(tokenizer):
    text = "Mila said: no.\nQuestion: Where is Mila? Answer: the old mill. Then: nothing.\n"
    tokens = make.encode(tokenizer, text)
    assert tokenizer.decode(tokens[make.answer_tokens(tokenizer, tokens)]) == " the old mill"


def test_training_resumes_from_its_checkpoint(tmp_path):
    model, other = make.new_model(0), make.new_model(1)
    optimizers, others = make.make_optimizers(model, 1e-3), make.make_optimizers(other, 1e-3)
    make.token_losses(model, torch.arange(32).view(1, 32)).mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    make.save_checkpoint(tmp_path / "one.safetensors", model, optimizers, 7)
    assert make.load_checkpoint_(tmp_path / "missing.safetensors", other, others) == 0
    assert make.load_checkpoint_(tmp_path / "one.safetensors", other, others) == 7
    make.save_checkpoint(tmp_path / "two.safetensors", other, others, 7)
    before, after = (read_tensors(tmp_path / f"{name}.safetensors")[0] for name in ("one", "two"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def choice_scores(model: LlamaForCausalLM, tokenizer, question: Question) -> list[float]:
    """Log-likelihood of every choice after the prompt, in one padded batch."""
    prompt = tokenizer(question.prompt)["input_ids"]
    rows = [prompt + tokenizer(f" {choice}", add_special_tokens=False)["input_ids"] for choice in question.choices]
    batch = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    chances = logits(model, batch).log_softmax(-1)
    return [
        sum(chances[row, k - 1, ids[k]].item() for k in range(len(prompt), len(ids))) for row, ids in enumerate(rows)
    ]


def test_bundled_model_answers_questions_about_held_out_stories(tokenizer):
    model = bundled_model(torch.float32)
    right = []
    for question in (question for story in generate_stories(20, make.TEST) for question in story.questions):
        scores = choice_scores(model, tokenizer, question)
        right.append(scores.index(max(scores)) == question.answer_index)
    # Chance is one in three; the model gets about half right (and no more than chance when asked for a colour).
    assert sum(right) / len(right) > 0.45
