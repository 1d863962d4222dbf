"""Tasks, MMLU and MT-Bench through the real main.py, on the bundled model."""

import csv
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, run_in_two, run_script
from script_cases import assert_refused, results_of, the_run

BUNDLED = ROOT / "assets/tiny-llama"
STORIES = ROOT / "assets/stories"
TEXT = ("--calib_dataset", STORIES / "calibration.txt", "--test_dataset", STORIES / "test.txt")
QUICK = ("--seqlen", 256, "--nsamples", 4, "--wbits", 4, "--abits", 4, "--max_rotation_step", 8, "--limit", 6)
USUAL = ("--model", BUNDLED, *TEXT, *QUICK, "--net", "tiny")
PIQA = {"goal": "open a jar", "sol1": "twist the lid", "sol2": "sing to the lid", "label": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Items of piqa, MMLU with two subjects, and three MT-Bench questions."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "tasks/piqa").mkdir(parents=True)
    goals = [{**PIQA, "goal": f"open jar {number}", "label": number % 2} for number in range(8)]
    (folder / "tasks/piqa/validation.jsonl").write_text("".join(json.dumps(item) + "\n" for item in goals))
    for split, count in (("dev", 5), ("test", 7)):
        (folder / "mmlu" / split).mkdir(parents=True)
        for subject in ("anatomy", "philosophy"):
            with open(folder / "mmlu" / split / f"{subject}_{split}.csv", "w", newline="") as file:
                rows = (
                    [f"Where was the {subject} of {n}?", "barn", "cave", "mill", "zoo", "ABCD"[n % 4]]
                    for n in range(count)
                )
                csv.writer(file).writerows(rows)
    questions = [
        {"question_id": number, "category": category, "turns": ["Who was in the barn?", "And after that?"]}
        for number, category in ((81, "writing"), (111, "math"), (131, "coding"))
    ]
    (folder / "question.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return folder


def asked(data) -> tuple:
    """Flags that ask for everything."""
    tasks = ("--tasks", "stories_qa,piqa", "--task_data_dir", data / "tasks", "--log_samples")
    mmlu = ("--eval_mmlu", "--mmlu_data_dir", data / "mmlu", "--mmlu_shots", 0, 2)
    return (*tasks, *mmlu, "--eval_mtbench", "--mtbench_questions", data / "question.jsonl", "--max_new_tokens", 5)


def answers_in(folder) -> Path:
    """The file of MT-Bench answers of the one W4A4 run that was started in `folder`."""
    run = the_run(folder / "output", "tiny_w4a4*")
    return run / f"mt_bench/model_answer/{run.name}.jsonl"


class Judge(BaseHTTPRequestHandler):
    """Grades every answer with a 7, after failing once."""

    failures = [429]  # noqa: RUF012 - shared on purpose

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        status = Judge.failures.pop() if Judge.failures else 200
        body = json.dumps({"choices": [{"message": {"role": "assistant", "content": "Fine. Rating: [[7]]"}}]}).encode()
        self.send_response(status)
        self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def judge_url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


@pytest.fixture(scope="module")
def whole(data, judge_url, tmp_path_factory):
    """Folder, results of both models and output of two runs with every evaluation; the second one has a report."""
    folder = tmp_path_factory.mktemp("whole")
    flags, printed = (*asked(data), "--judge_base_url", judge_url, "--judge_model", "grader"), []
    for bits, more in ((16, ()), (4, ("--report", "--report_layers", 0))):
        done = run_script("main.py", *USUAL, *flags, *more, "--wbits", bits, "--abits", bits, folder=folder)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    return folder, [results_of(folder, name) for name in ("tiny_w4a4*", "tiny_w16a16*")], "".join(printed)


def test_every_evaluation_of_both_models_is_in_the_results_and_the_table(whole):
    _, results, printed = whole
    for figures in results:
        assert {score["task"]: score["items"] for score in figures["zero_shot"]["scores"]} == {
            "stories_qa": 6,
            "piqa": 6,
        }
        assert figures["mmlu"]["0_shot"]["questions"] == figures["mmlu"]["2_shot"]["questions"] == 12
        assert figures["mt_bench"]["scores"]["average"] == 7
        assert figures["failures"] == {}
    for figure in ("stories_qa acc", "piqa acc", "piqa acc_norm", "MMLU 0-shot", "MMLU 2-shot", "MT-Bench"):
        assert len(re.findall(rf"^\| {figure} +\| +[\d.–]+ \|", printed, re.MULTILINE)) == 2
    assert re.search(r"^\| MT-Bench +\| +– \| +7.00 \|$", printed, re.MULTILINE)


def test_a_report_measures_the_full_model_too_and_shows_what_was_lost(whole):
    folder, (ours, full), _ = whole
    beside = ours["full_precision"]
    for name in ("zero_shot", "mmlu"):
        assert without_clocks(beside[name]) == without_clocks(full[name])
    assert beside["mt_bench"] is None
    opening = (the_run(folder / "output", "tiny_w4a4*") / "report/index.html").read_text().partition('id="worst"')[0]
    for figures in (ours, beside):
        assert f'<data value="{figures["mmlu"]["2_shot"]["accuracy"]!r}">' in opening
        assert f'<data value="{figures["zero_shot"]["scores"][0]["metrics"]["acc"]!r}">' in opening
    assert "not measured" not in opening


def test_what_was_answered_is_left_in_files(whole):
    for bits in (4, 16):
        left = the_run(whole[0] / "output", f"tiny_w{bits}a{bits}*")
        samples = (left / "samples/quantized/samples_piqa.jsonl").read_text().splitlines()
        assert len(samples) == 6
        assert len((left / "mmlu/quantized/mmlu_answers_2shot.csv").read_text().splitlines()) == 1 + 12
        assert (left / "mmlu/quantized/mmlu.csv").exists()
        answers = [
            json.loads(line) for line in (left / f"mt_bench/model_answer/{left.name}.jsonl").read_text().splitlines()
        ]
        assert [line["question_id"] for line in answers] == [81, 111, 131]
        assert all(len(line["choices"][0]["turns"]) == 2 for line in answers)
        judgements = (left / f"mt_bench/model_judgment/grader_{left.name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["score"] for line in judgements] == [7] * 6


def without_clocks(figures: object) -> object:
    if isinstance(figures, dict):
        return {key: without_clocks(value) for key, value in figures.items() if key != "seconds"}
    return [without_clocks(value) for value in figures] if isinstance(figures, list) else figures


def test_two_processes_find_what_one_finds(whole, data, tmp_path):
    done = run_in_two(tmp_path, *USUAL, *asked(data))
    assert done.returncode == 0, done.stderr
    results, (folder, (expected, _), _) = results_of(tmp_path), whole
    for name in ("zero_shot", "mmlu"):
        assert without_clocks(results[name]) == without_clocks(expected[name])
    texts = [[json.loads(line)["choices"] for line in answers_in(root).open()] for root in (folder, tmp_path)]
    assert texts[0] == texts[1]


def test_answers_that_are_there_are_not_written_again_and_a_judge_may_come_later(whole, data, judge_url, tmp_path):
    flags = ("--eval_mtbench", "--mtbench_questions", data / "question.jsonl", "--max_new_tokens", 5)
    assert run_script("main.py", *USUAL, *flags, folder=tmp_path).returncode == 0
    answers = answers_in(tmp_path)
    before = answers.read_text()
    judge = ("--judge_base_url", judge_url, "--judge_model", "grader")
    done = run_script("main.py", *USUAL, *flags, *judge, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 questions are answered" in done.stdout
    assert answers.read_text() == before
    assert results_of(tmp_path)["mt_bench"]["scores"]["average"] == 7


def test_answers_of_another_setting_are_in_a_folder_of_their_own(data, tmp_path):
    flags = ("--eval_mtbench", "--mtbench_questions", data / "question.jsonl", "--chat_format", "vicuna")
    assert run_script("main.py", *USUAL, *flags, "--max_new_tokens", 5, folder=tmp_path).returncode == 0
    answers = answers_in(tmp_path)
    before = answers.read_text()
    done = run_script("main.py", *USUAL, *flags, "--max_new_tokens", 6, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("output/*/mt_bench/model_answer/*.jsonl"))) == 2
    assert answers.read_text() == before


def test_answers_of_another_model_are_refused_before_weights_are_loaded(data, tmp_path):
    shutil.copy(STORIES / "calibration.txt", tmp_path / "own.txt")
    flags = ("--eval_mtbench", "--mtbench_questions", data / "question.jsonl", "--calib_dataset", "own.txt")
    flags = (*USUAL, *flags, "--chat_format", "vicuna", "--max_new_tokens", 5)
    assert run_script("main.py", *flags, folder=tmp_path).returncode == 0
    answers = answers_in(tmp_path)
    before = answers.read_text()
    shutil.copy(STORIES / "test.txt", tmp_path / "own.txt")
    assert_refused(run_script("main.py", *flags, folder=tmp_path), f"model_answer/{answers.name}")
    assert answers.read_text() == before


def test_a_judge_that_is_down_loses_no_answer_and_no_other_figure(data, tmp_path):
    flags = ("--eval_mtbench", "--mtbench_questions", data / "question.jsonl", "--max_new_tokens", 5, "--eval_ppl")
    judge = ("--judge_base_url", "http://127.0.0.1:9/v1", "--judge_model", "grader")
    backs_off = "import time\ntime.sleep = lambda seconds: None\n"
    done = run_script("main.py", *USUAL, *flags, *judge, folder=tmp_path, first=backs_off)
    assert done.returncode == 1
    results = results_of(tmp_path)
    assert "JudgeError" in results["failures"]["MT-Bench"]
    assert results["perplexity"]["test"] > 1
    assert len(answers_in(tmp_path).read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tasks", "arc_eazy"), "arc_easy"),
        (("--num_fewshot", "2"), "--num_fewshot is for --tasks"),
        (("--tasks", "piqa", "--task_data_dir", "nowhere"), "nowhere is not a folder"),
        (("--tasks", "winogrande", "--task_data_dir", "{data}/tasks"), "winogrande/validation.jsonl is missing"),
        (("--eval_mmlu",), "--mmlu_data_dir"),
        (("--eval_mmlu", "--mmlu_data_dir", "nowhere"), "nowhere"),
        (("--eval_mmlu", "--mmlu_data_dir", "{data}/mmlu", "--mmlu_shots", "-1"), "--mmlu_shots -1"),
        (("--eval_mtbench", "--mtbench_questions", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--judge_model", "grader"), "--judge_model is for --judge_base_url"),
        (("--eval_mtbench", "--mtbench_questions", "{data}/question.jsonl", "--judge_base_url", "host"), "--judge"),
    ],
)
def test_bad_input_is_one_line_before_weights_are_loaded(data, flags, words, tmp_path):
    flags = [flag.format(data=data) for flag in flags]
    done = run_script("main.py", *USUAL, *flags, folder=tmp_path)
    assert_refused(done, words)
    assert not (tmp_path / "output").exists()


def test_a_malformed_item_is_named_with_its_line(tmp_path):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/validation.jsonl").write_text(json.dumps(PIQA) + "\n" + json.dumps({**PIQA, "label": "x"}) + "\n")
    done = run_script("main.py", *USUAL, "--tasks", "piqa", "--task_data_dir", tmp_path, folder=tmp_path)
    assert_refused(done, "piqa/validation.jsonl:2")
