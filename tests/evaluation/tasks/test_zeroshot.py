"""lm-eval's tasks on local items: the same figures as lm-eval by itself, and nothing lost when something is wrong."""

import copy
import io
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ROOT, run_program
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation.journal import Journal
from evaluation.tasks import harness
from evaluation.tasks.data import read_items
from evaluation.tasks.plan import PAPER_TASKS, TaskPlan, check_tasks, needed_splits, task_index
from evaluation.tasks.scores import TaskScore, ZeroShot, mean_of, zero_shot_table
from evaluation.tasks.zeroshot import evaluate_tasks, samples_path
from utils import log
from utils.errors import InputError

BUNDLED_MODEL = ROOT / "assets/tiny-llama"
CPU = torch.device("cpu")
EVALUATED = {
    "arc_easy": "test",
    "arc_challenge": "test",
    "hellaswag": "validation",
    "winogrande": "validation",
    "boolq": "validation",
    "piqa": "validation",
}
THINGS = ("kite", "lamp", "drum", "ladder", "pillow", "violin", "spoon", "compass", "ball", "coat", "bell", "map")
PLACES = ("barn", "cave", "school", "river", "zoo", "cellar", "mill", "shop", "park", "harbour", "tower", "garden")


def item(task: str, index: int) -> dict:
    """An invented item with the field names of the hub's dataset."""
    thing, other, place = THINGS[index % 12], THINGS[(index + 5) % 12], PLACES[index * 7 % 12]
    if task.startswith("arc"):
        text = [f"in the {place}", f"on the {other}", f"the {thing} itself", "nowhere"]
        choices = {"text": text, "label": ["A", "B", "C", "D"]}
        return {
            "id": f"q{index}",
            "question": f"Where is the {thing}?",
            "choices": choices,
            "answerKey": "ABCD"[index % 4],
        }
    if task == "hellaswag":
        endings = [f"leaves [title] the {place}.", f"finds a {other}.", "sings.", f"puts it  by the {place} wall."]
        context = {"activity_label": f"Carrying a {thing}", "ctx_a": f"A girl has a {thing}.", "ctx_b": "she"}
        return {"ind": index, **context, "endings": endings, "label": str(index % 4)}
    if task == "winogrande":
        sentence = f"The {thing} did not fit into the {other} because the _ was too small."
        return {"sentence": sentence, "option1": thing, "option2": other, "answer": "12"[index % 2]}
    if task == "boolq":
        passage = f"The {thing} is in the {place}. The {other} is not."
        return {"question": f"is the {thing} in the {place}", "passage": passage, "idx": index, "label": index % 2}
    return {
        "goal": f"Find the {thing}.",
        "sol1": f"Look in the {place}.",
        "sol2": f"Ask the {other}.",
        "label": index % 2,
    }


def write_items(path: Path, items: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in items), encoding="utf-8")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """Twelve items of each of the six tasks, and others of arc_easy to take examples from."""
    folder = tmp_path_factory.mktemp("items")
    for task, split in EVALUATED.items():
        write_items(folder / task / f"{split}.jsonl", [item(task, index) for index in range(12)])
    write_items(folder / "arc_easy/train.jsonl", [item("arc_easy", index) for index in range(20, 28)])
    return folder


@pytest.fixture(scope="module")
def bundled():
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(BUNDLED_MODEL, local_files_only=True)


@pytest.fixture
def run(bundled, tmp_path):
    """Evaluate a plan on the bundled model, with a journal that lasts for the test."""

    def evaluate(plan: TaskPlan, model=None, limit: int | None = None, log_samples: Path | None = None) -> ZeroShot:
        return evaluate_tasks(
            model or bundled[0],
            bundled[1],
            plan,
            device=CPU,
            batch_size=None,
            limit=limit,
            journal=Journal(tmp_path / "journal.jsonl", plan.identity),
            log_samples=log_samples,
        )

    return evaluate


def stock_results(folder: Path, plan: TaskPlan, num_fewshot: int | None = None) -> dict:
    """What lm-eval by itself finds on the bundled model and the plan's items, read by `datasets` as JSON."""
    import lm_eval
    import lm_eval.tasks

    index = task_index(True)
    folder.mkdir()
    for task, files in plan.files.items():
        local = {split: files.get(split, next(iter(files.values()))) for split in ("train", "validation", "test")}
        settings = {
            "include": str(index[task].yaml_path),
            "task": task,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": local, "cache_dir": str(folder / "cache")},
        }
        (folder / f"{task}.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(BUNDLED_MODEL), "dtype": "float32"},
        device="cpu",
        batch_size=16,
        tasks=list(plan.files),
        num_fewshot=num_fewshot,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False, include_path=folder),
    )


def logged(folder: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in samples_path(folder, task).read_text(encoding="utf-8").splitlines()]


def assert_like_stock(score: TaskScore, stock: dict, samples: list[dict], tolerance: float) -> None:
    found = stock["results"][score.task]
    assert score.metrics == {key.removesuffix(",none"): value for key, value in found.items() if "," in key}
    assert score.version == str(stock["versions"][score.task])
    assert score.items == len(samples) == len(stock["samples"][score.task])
    for ours, theirs in zip(samples, stock["samples"][score.task], strict=True):
        assert ours["arguments"] == [list(arguments) for arguments in theirs["arguments"]]
        for own, other in zip(ours["filtered_resps"], theirs["filtered_resps"], strict=True):
            assert own[0] == pytest.approx(other[0], rel=tolerance, abs=tolerance)
            assert own[1] == other[1]


def test_six_tasks_give_what_lm_eval_gives_by_itself(run, data_dir, tmp_path):
    plan = check_tasks(PAPER_TASKS, data_dir)
    result = run(plan, log_samples=tmp_path)
    stock = stock_results(tmp_path / "stock", plan)
    assert [score.task for score in result.scores] == list(PAPER_TASKS)
    assert result.failed == {}
    for score in result.scores:  # lm-eval mixes the tasks' requests in its batches, so the last bits differ
        assert_like_stock(score, stock, logged(tmp_path, score.task), 1e-5)
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"} <= result.scores[0].metrics.keys()
    values = [score.metrics["acc"] for score in result.scores]
    assert result.average.acc == pytest.approx(sum(values) / 6)


def test_examples_in_the_prompt_are_those_lm_eval_draws_and_every_bit_is_equal(run, data_dir, tmp_path):
    plan = check_tasks(["arc_easy"], data_dir, num_fewshot=2)
    result = run(plan, log_samples=tmp_path)
    samples = logged(tmp_path, "arc_easy")
    assert_like_stock(result.scores[0], stock_results(tmp_path / "stock", plan, 2), samples, 0)
    assert result.scores[0].num_fewshot == 2
    assert samples[0]["arguments"][0][0].count("Question:") == 3


def test_logits_are_made_of_continuations_and_of_fewer_requests_at_a_time_where_they_would_be_too_many(
    bundled, monkeypatch
):
    model, tokenizer = bundled
    requests = [(None, list(range(5, 5 + 3 * n)), list(range(40, 40 + n % 3 + 1))) for n in range(1, 12)]
    shapes, answers = [], []
    handle = model.lm_head.register_forward_hook(lambda module, args, logits: shapes.append(logits.shape[:2]))
    for most in (10**9, 20, 1):
        monkeypatch.setattr(harness, "tokens_at_once", lambda vocabulary, most=most: most)
        lm = harness.PlacedLM(model, tokenizer, CPU, 4)
        lm._own_cut = 0
        answers.append(lm._loglikelihood_tokens(requests, disable_tqdm=True))
        rows, positions = zip(*shapes, strict=True)
        assert sum(rows) == len(requests)
        assert max(positions) <= 9 + 3  # from where the shortest of four begins to be read: three tokens a request
        if most == 10**9:
            assert max(rows) == 4
        assert all(row * count <= most or row == 1 for row, count in shapes)
        shapes.clear()
    handle.remove()
    whole = [answer for answer, _ in answers[0]]
    for number, (_, context, continuation) in enumerate(requests):
        tokens = torch.tensor([context + continuation])
        scores = model(tokens).logits[0].log_softmax(-1)[len(context) - 1 : -1]
        expected = scores.gather(1, torch.tensor(continuation)[:, None]).sum().item()
        assert whole[number] == pytest.approx(expected, rel=1e-5)
    for each in answers[1:]:
        assert [answer for answer, _ in each] == pytest.approx(whole, rel=1e-5)


def test_bundled_model_answers_bundled_questions_from_any_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(check_tasks(["stories_qa"]), limit=150)
    assert result.scores[0].items == 150
    assert result.scores[0].metrics["acc"] > 0.45  # chance is a third
    assert result.average is None


def test_bundled_items_are_used_unless_the_data_folder_has_the_task(data_dir, tmp_path):
    plan = check_tasks(["piqa", "stories_qa"], data_dir)
    assert plan.files["stories_qa"] == {"test": str(ROOT / "assets/stories/questions.jsonl")}
    own = {"prompt": "One?", "choices": ["a", "b"], "answer_index": 1}
    write_items(tmp_path / "stories_qa/test.jsonl", [own])
    assert check_tasks(["stories_qa"], tmp_path).files["stories_qa"] == {
        "test": str(tmp_path / "stories_qa/test.jsonl")
    }
    with pytest.raises(InputError, match="--num_fewshot: stories_qa has no items to draw examples from"):
        check_tasks(["stories_qa"], num_fewshot=1)


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        ([], {}, "--tasks: no task is named"),
        (["piqa"], {"num_fewshot": -1}, "--num_fewshot: -1 is negative"),
        (["piqa"], {"data_dir": Path("/nowhere")}, "--task_data_dir: /nowhere is not a folder"),
    ],
)
def test_settings_that_make_no_sense_are_refused(names, settings, message):
    with pytest.raises(InputError, match=message):
        check_tasks(names, **settings)


def test_an_unknown_task_lists_close_matches():
    with pytest.raises(InputError, match=r"no task or group 'hellaswga'; close matches: .*hellaswag"):
        check_tasks(["hellaswga"])


def test_a_task_that_runs_written_code_is_refused():
    with pytest.raises(InputError, match="humaneval would run code"):
        check_tasks(["humaneval"])


def test_a_tag_stands_for_its_tasks_and_a_group_stays_one_unit():
    plan = check_tasks(["ai2_arc", "mmlu", "arc_easy"])
    assert plan.units == ("arc_challenge", "arc_easy", "mmlu")
    assert len(plan.members["mmlu"]) == 57
    assert plan.from_hub("mmlu")


def test_with_a_data_folder_a_group_names_the_missing_file_of_a_member(tmp_path):
    with pytest.raises(InputError, match=r"mmlu_\w+/test.jsonl is missing"):
        check_tasks(["mmlu"], tmp_path)


def test_the_short_index_has_the_same_tasks_as_the_whole_one():
    short, whole = task_index(True), task_index(False)
    for task in (*PAPER_TASKS, "stories_qa"):
        assert (short[task].yaml_path, short[task].cfg) == (whole[task].yaml_path, whole[task].cfg)


def test_a_group_from_local_items_has_its_own_row_and_its_members(run, tmp_path):
    folder = tmp_path / "data"
    members = check_tasks(["mmlu_other"]).members["mmlu_other"]
    for number, task in enumerate(members):
        rows = [
            {
                "question": f"Which {thing}?",
                "subject": task,
                "choices": list(THINGS[:4]),
                "answer": (index + number) % 4,
            }
            for index, thing in enumerate(THINGS[:3])
        ]
        write_items(folder / task / "test.jsonl", rows)
    result = run(check_tasks(["mmlu_other"], folder))
    whole, *parts = result.scores
    assert (whole.task, whole.group, whole.items) == ("mmlu_other", None, 3 * len(members))
    assert {part.task for part in parts} == set(members)
    assert {part.group for part in parts} == {"mmlu_other"}
    assert whole.metrics["acc"] == pytest.approx(sum(part.metrics["acc"] for part in parts) / len(parts))


def test_examples_need_the_split_they_are_drawn_from(data_dir):
    with pytest.raises(InputError, match=r"arc_challenge/train.jsonl is missing; arc_challenge needs it"):
        check_tasks(["arc_easy", "arc_challenge"], data_dir, num_fewshot=1)
    assert check_tasks(["arc_challenge"], data_dir, num_fewshot=0).files.keys() == {"arc_challenge"}


def test_splits_follow_the_description_of_the_task():
    splits = {"training_split": "train", "validation_split": "dev", "test_split": "test"}
    assert needed_splits(splits, None) == ("test",)
    assert needed_splits(splits, 3) == ("test", "train")
    assert needed_splits({**splits, "fewshot_split": "dev"}, 3) == ("test", "dev")
    assert needed_splits({**splits, "fewshot_config": {"split": "dev"}}, 3) == ("test", "dev")
    assert needed_splits({**splits, "fewshot_config": {"samples": [{}]}}, 3) == ("test",)
    assert needed_splits({**splits, "num_fewshot": 5}, None) == ("test", "train")
    assert needed_splits({**splits, "num_fewshot": 0}, 3) == ("test",)
    assert needed_splits({"validation_split": "dev"}, 3) == ("dev",)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("arc_easy", {"question": 3}, "field 'question' must be a string"),
        ("arc_easy", {"answerKey": "E"}, r"field 'answerKey' must be one of choices\.label"),
        ("arc_challenge", {"choices": {"text": ["a", "b"], "label": ["A"]}}, "field 'choices' must be"),
        ("hellaswag", {"label": "4"}, "field 'label' must be the index of an ending"),
        ("hellaswag", {"label": 1}, "field 'label' must be the index of an ending"),
        ("hellaswag", {"ctx_b": None}, "field 'ctx_b' must be a string"),
        ("winogrande", {"answer": 1}, 'field \'answer\' must be "1" or "2"'),
        ("winogrande", {"sentence": "No gap."}, "field 'sentence' must be a string with a gap"),
        ("boolq", {"label": True}, "field 'label' must be 0 or 1"),
        ("piqa", {"label": 2}, "field 'label' must be 0 or 1"),
        ("piqa", {"extra": 2}, "field 'extra' is new"),
    ],
)
def test_a_malformed_item_is_named_with_its_line(tmp_path, task, change, message):
    path = tmp_path / task / f"{EVALUATED[task]}.jsonl"
    write_items(path, [item(task, 0), item(task, 1), {**item(task, 2), **change}])
    with pytest.raises(InputError, match=message) as caught:
        check_tasks([task], tmp_path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["goal", "sol1", "sol2", "label"])
def test_a_missing_field_is_named_with_its_line(tmp_path, field):
    broken = item("piqa", 1)
    del broken[field]
    write_items(tmp_path / "items.jsonl", [item("piqa", 0), broken])
    with pytest.raises(InputError, match=rf"items.jsonl:2: no field '{field}'"):
        read_items("piqa", tmp_path / "items.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n\n{"a": 2\n', r":3: not JSON \(.*column 8\)"),
        (b'{"a": 1}\n[1]\n', r":2: not a JSON object, \{\.\.\.\}, but a list"),
        (b'{"a": 1}\n{"a": "\xff"}\n', ":2: not UTF-8"),
        (b'{"a": 1}\n{"b": 1}\n', r":2: field '[ab]' is (new|missing)"),
        (b'{"a": 1}\n{"a": "1"}\n', ":2: field 'a' is a string, in the first line it is a number"),
        (b"\n\n", ": holds no item"),
    ],
)
def test_lines_of_any_task_are_checked(tmp_path, content, message):
    path = tmp_path / "items.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_items("some_task", path)


def test_line_ends_inside_strings_and_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_bytes('\ufeff{"a": "one\u2028two"}\r\n{"a": null}\n'.encode())
    assert read_items("some_task", path) == [{"a": "one\u2028two"}, {"a": None}]


def test_boolq_takes_the_answers_of_the_original_dataset(tmp_path):
    entry = item("boolq", 1)
    del entry["label"]
    write_items(tmp_path / "items.jsonl", [{**entry, "answer": True}, {**entry, "answer": False}])
    assert [row["label"] for row in read_items("boolq", tmp_path / "items.jsonl")] == [1, 0]


def test_a_task_that_fails_keeps_the_others_and_is_tried_again(run, data_dir, monkeypatch, caplog):
    from evaluation.tasks import zeroshot

    evaluate_unit = zeroshot._evaluate_unit

    def fail_on_piqa(lm, manager, unit, *rest):
        if unit == "piqa":
            raise RuntimeError("no luck today")
        return evaluate_unit(lm, manager, unit, *rest)

    monkeypatch.setattr(zeroshot, "_evaluate_unit", fail_on_piqa)
    plan = check_tasks(["winogrande", "piqa", "boolq"], data_dir)
    result = run(plan)
    assert [score.task for score in result.scores] == ["winogrande", "boolq"]
    assert "no luck today" in result.failed["piqa"]
    assert any(record.exc_info for record in caplog.records if record.levelname == "ERROR")
    assert "| piqa " in zero_shot_table(result)
    assert "failed" in zero_shot_table(result)
    again = run(plan)
    assert again.scores == result.scores
    assert again.failed.keys() == {"piqa"}


class Broken(torch.nn.Module):
    """Stands where a model would, to show that it is not asked."""

    def __init__(self, model):
        super().__init__()
        self.config, self.device, self.head = model.config, CPU, model.get_output_embeddings()

    def get_output_embeddings(self):
        return self.head

    def forward(self, *args, **kwargs):
        raise KeyboardInterrupt


def test_an_interrupted_evaluation_goes_on_behind_what_is_done(run, bundled, data_dir):
    first = run(check_tasks(["piqa"], data_dir)).scores
    plan = check_tasks(["piqa"], data_dir)
    assert run(plan, Broken(bundled[0])).scores == first
    with pytest.raises(KeyboardInterrupt):
        run(check_tasks(["boolq"], data_dir), Broken(bundled[0]))


def test_a_task_whose_log_is_missing_is_evaluated_again(run, data_dir, tmp_path):
    plan = check_tasks(["piqa"], data_dir)
    run(plan)
    run(plan, log_samples=tmp_path / "log")
    rows = logged(tmp_path / "log", "piqa")
    assert [row["doc_id"] for row in rows] == list(range(12))
    assert rows[3]["doc"] == item("piqa", 3)
    assert {"target", "arguments", "resps", "acc", "acc_norm"} <= rows[0].keys()


def test_items_decide_whether_a_journal_is_believed(data_dir, tmp_path):
    write_items(tmp_path / "piqa/validation.jsonl", [item("piqa", 5)])
    one, other = check_tasks(["piqa"], data_dir), check_tasks(["piqa"], tmp_path)
    assert one.identity == check_tasks(["piqa"], data_dir).identity
    assert one.identity != other.identity
    assert one.identity != check_tasks(["piqa"], data_dir, num_fewshot=0).identity


def test_without_the_hub_one_line_says_what_to_do(run, monkeypatch, caplog):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/nowhere")
    result = run(check_tasks(["winogrande", "stories_qa"]), limit=2)
    assert [score.task for score in result.scores] == ["stories_qa"]
    assert "cannot be downloaded" in result.failed["winogrande"]
    assert "--task_data_dir" in result.failed["winogrande"]
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.exc_info is None


def test_a_hub_that_does_not_answer_is_asked_once(run, monkeypatch, caplog):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/nowhere")
    result = run(check_tasks(["winogrande", "piqa"]))
    assert result.failed.keys() == {"winogrande", "piqa"}
    assert sum("does not answer" in record.message for record in caplog.records) == 1
    assert not constants.HF_HUB_OFFLINE


def test_model_and_tokenizer_stay_as_they_are(run, bundled, data_dir, monkeypatch):
    model, tokenizer = bundled
    monkeypatch.setattr(type(model), "tie_weights", lambda *args, **kwargs: pytest.fail("weights were tied anew"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    run(check_tasks(["piqa"], data_dir))
    assert tokenizer.pad_token is None
    assert "tie_weights" not in vars(model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_whose_weights_accelerate_keeps_elsewhere_gives_the_same(run, bundled, data_dir, tmp_path):
    from accelerate import cpu_offload

    plan = check_tasks(["piqa"], data_dir)
    expected = run(plan).scores[0].metrics
    (tmp_path / "journal.jsonl").unlink()
    offloaded = cpu_offload(copy.deepcopy(bundled[0]), CPU)
    assert offloaded.device.type == "meta"
    assert run(plan, offloaded).scores[0].metrics == expected


def test_nothing_is_printed_without_a_terminal(run, data_dir, capfd):
    run(check_tasks(["hellaswag"], data_dir))
    assert capfd.readouterr() == ("", "")


def test_a_terminal_sees_one_bar(run, data_dir, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    run(check_tasks(["piqa"], data_dir, 0))
    drawn = [line.strip() for line in sys.stderr.getvalue().split("\r") if line.strip()]
    assert all(line.startswith("piqa: ") and "/24 [" in line for line in drawn)  # two answers to each of twelve
    assert drawn


def test_every_request_is_counted(run, data_dir, monkeypatch, capsys):
    monkeypatch.setattr(log, "PLAIN_INTERVAL", 0.0)
    monkeypatch.setattr(log, "PLAIN_SHARE", 0.0)
    run(check_tasks(["piqa"], data_dir, 0))
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition("| ")[2].partition(" ")[0] for line in lines] == [f"{n}/24" for n in range(1, 25)]


def test_requests_longer_than_the_context_are_counted(run, tmp_path):
    rows = [item("boolq", index) for index in range(3)]
    rows[1]["passage"] = "The kite is red. " * 400
    write_items(tmp_path / "data/boolq/validation.jsonl", rows)
    assert run(check_tasks(["boolq"], tmp_path / "data")).scores[0].cut == 2  # yes and no


TWO_PROCESSES = """
import json, sys, torch
from dataclasses import asdict
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from evaluation.journal import Journal
from evaluation.tasks.plan import check_tasks
from evaluation.tasks.zeroshot import evaluate_tasks
from utils.distributed import join_group, leave_group, rank

model_folder, data, out = map(Path, sys.argv[1:])
join_group()
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
plan = check_tasks(["winogrande", "boolq"], data)
result = evaluate_tasks(
    model, AutoTokenizer.from_pretrained(model_folder), plan, device=torch.device("cpu"), batch_size=1, limit=5,
    journal=Journal(out / "journal", plan.identity), log_samples=out,
)
rows = [{**asdict(score), "seconds": 0} for score in result.scores]
(out / f"rank{rank()}.json").write_text(json.dumps(rows))
leave_group()
"""


@pytest.mark.parametrize(
    ("lengths", "kept"), [((5, 3), (5, 3)), ((0, 7), (0, 7)), ((5, 8), (1, 7)), ((5, 30), (1, 7)), ((0, 8), (1, 7))]
)
def test_a_continuation_longer_than_the_context_keeps_its_end(lengths, kept):
    from evaluation.tasks.harness import last_tokens

    context, continuation = list(range(lengths[0])), list(range(100, 100 + lengths[1]))
    found = last_tokens(context, continuation, 8)
    assert tuple(map(len, found)) == kept
    assert [*context, *continuation][-sum(kept) :] == [*found[0], *found[1]]


def test_items_shared_by_two_processes_give_what_one_alone_finds(bundled, data_dir, tmp_path):
    plan = check_tasks(["winogrande", "boolq"], data_dir)
    journal = Journal(tmp_path / "alone", plan.identity)
    alone = evaluate_tasks(
        *bundled, plan, device=CPU, batch_size=1, limit=5, journal=journal, log_samples=tmp_path / "log"
    )
    done = run_program(TWO_PROCESSES, tmp_path, BUNDLED_MODEL, data_dir, tmp_path)
    assert done.returncode == 0, done.stderr
    expected = [{**asdict(score), "seconds": 0} for score in alone.scores]
    assert [json.loads((tmp_path / f"rank{number}.json").read_text()) for number in (0, 1)] == [expected, expected]
    for task in ("winogrande", "boolq"):
        assert logged(tmp_path, task) == logged(tmp_path / "log", task)


def score(task: str, **metrics: float) -> TaskScore:
    return TaskScore(task, metrics, items=100, version="1.0", num_fewshot=0, seconds=1.0)


def test_the_average_takes_acc_norm_where_a_task_has_it():
    scores = [score(task, acc=0.1 * index) for index, task in enumerate(PAPER_TASKS)]
    assert mean_of(scores, PAPER_TASKS).acc == pytest.approx(0.25)
    scores[5] = score("piqa", acc=0.5, acc_norm=0.8)
    assert mean_of(scores, PAPER_TASKS).acc == pytest.approx(0.25)
    assert mean_of(scores, PAPER_TASKS).acc_norm == pytest.approx(0.3)
    assert mean_of(scores[:5], PAPER_TASKS) is None


def test_the_table_names_what_a_mean_is_over_and_shows_other_metrics():
    scores = (score("piqa", acc=0.5, acc_stderr=0.05, acc_norm=0.6, acc_norm_stderr=0.04), score("boolq", acc=0.7))
    assert zero_shot_table(ZeroShot(scores, {}, None, None, {})).splitlines() == [
        "| task                |    acc |      ± | acc_norm |      ± | items |",
        "| :------------------ | -----: | -----: | -------: | -----: | ----: |",
        "| piqa                | 0.5000 | 0.0500 |   0.6000 | 0.0400 |   100 |",
        "| boolq               | 0.7000 |      – |        – |      – |   100 |",
        "| mean of piqa, boolq | 0.6000 |        |   0.6500 |        |       |",
    ]
    generated = score("gsm8k", **{"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1})
    assert "exact_match,strict 0.2500" in zero_shot_table(ZeroShot((generated,), {}, None, None, {}))


def test_real_items_are_accepted_and_evaluated(run, shared_data, bundled):
    plan = check_tasks(PAPER_TASKS, shared_data / "zeroshot")
    result = run(plan, limit=4)
    assert result.failed == {}
    assert result.average.tasks == PAPER_TASKS
    assert all(math.isfinite(value) for entry in result.scores for value in entry.metrics.values())
