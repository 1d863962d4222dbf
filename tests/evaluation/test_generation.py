"""`--prompt`: all prompts in batches, each with its own text."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from transformers import AutoTokenizer

from evaluation.generation import Completions
from evaluation.settings import EvaluationSettings, PromptSettings

CPU = torch.device("cpu")
PROMPTS = ("w1 w2 w3 w4 w5", "w6", "", "w7 w8 w9")


@pytest.fixture
def completed(model_folder):
    """The texts by prompt, and the rows of every forward pass."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    def complete(batch_size: int | None) -> tuple[dict[str, str], list[int]]:
        model, rows = tiny_model(torch.float64), []
        model.get_input_embeddings().register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
        context = SimpleNamespace(tokenizer=tokenizer, device=CPU)
        evaluation = Completions(PromptSettings(PROMPTS), context, EvaluationSettings(eval_batch_size=batch_size))
        evaluation.max_new_tokens = 3
        findings = [finding.results["completions"] for finding in evaluation.run(model, None)]
        assert [list(each) for each in findings] == [[prompt] for prompt in PROMPTS]
        return {prompt: text for each in findings for prompt, text in each.items()}, rows

    return complete


@pytest.mark.parametrize(
    ("batch_size", "expected"), [(None, [1, 1, 1, 3, 3]), (2, [1, 1, 2, 2, 1, 1, 1]), (1, [1] * 9)]
)
def test_prompts_of_a_batch_go_through_the_model_together_to_the_same_texts(completed, batch_size, expected):
    alone, _ = completed(1)
    texts, rows = completed(batch_size)
    assert texts == alone
    assert rows == expected
    assert texts[""] == ""
    assert len({text for prompt, text in texts.items() if prompt}) == 3
