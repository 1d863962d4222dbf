"""Judging against a real HTTP server on the loopback that speaks the protocol, its failures included."""

import json
import logging
import socket
import threading
import time
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from evaluation.mtbench import endpoint as endpoint_module
from evaluation.mtbench.answers import Question, read_questions, read_references
from evaluation.mtbench.endpoint import Endpoint, JudgeError, open_endpoint
from evaluation.mtbench.judge import (
    ask_for_rating,
    find_rating,
    judge_answers,
    judge_messages,
    score_table,
    summarize,
)
from utils.errors import InputError

KEY = "sk-secret-0123456789"
RATED = "Short but right. Rating: [[7]]"
QUESTIONS = (
    Question(1, "math", ("What is 2 + 2?", "And 3 + 3?")),
    Question(2, "writing", ("Write a line.", "Another {line}.")),
)
ANSWERS = [
    {"question_id": 1, "model_id": "tiny", "choices": [{"index": 0, "turns": ["It is four.", "It is seven."]}]},
    {"question_id": 2, "model_id": "tiny", "choices": [{"index": 0, "turns": ["A line {0}.", ""]}]},
]
REFERENCES = {1: ("The first sum is 4.", "The second sum is 6."), 2: ("Unused.", "Unused.")}


@dataclass
class Reply:
    """What the server does with one request."""

    text: str | None = RATED
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    cut: bool = False  # close the connection in the middle of the body
    silent: float = 0.0  # seconds before anything is sent

    def content(self) -> bytes:
        if self.body is not None:
            return self.body
        if self.status != 200:
            return json.dumps({"error": {"message": self.text}}).encode()
        return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": self.text}}]}).encode()


class Server(ThreadingHTTPServer):
    """Plays `script`, one reply after another, then answers every request with a rating; keeps what it was sent."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Reply] = []
        self.requests: list[dict] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append({"path": self.path, "headers": dict(self.headers), **body})
        reply = self.server.script.pop(0) if self.server.script else Reply()
        time.sleep(reply.silent)
        content = reply.content()
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if reply.cut else content)

    def do_GET(self):
        self.server.requests.append({"path": self.path, "headers": dict(self.headers)})
        self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def judge(server):
    return Endpoint(server.url, "judge-model", KEY, timeout=10, retries=3, base_delay=0.001)


@pytest.fixture
def judged(judge, tmp_path):
    def run(answers=ANSWERS, references=REFERENCES, by=judge) -> list[dict]:
        return judge_answers(by, QUESTIONS, answers, references, tmp_path / "judgements.jsonl")

    return run


def kept(tmp_path) -> list[dict]:
    path = tmp_path / "judgements.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_request_is_one_of_the_protocol(judge, server):
    messages = [{"role": "user", "content": "Schöne Grüße ☃"}]
    assert judge.complete(messages) == RATED
    (sent,) = server.requests
    assert sent["path"] == "/v1/chat/completions"
    assert sent["headers"]["Authorization"] == f"Bearer {KEY}"
    assert sent["headers"]["Content-Type"] == "application/json"
    assert (sent["model"], sent["messages"], sent["temperature"]) == ("judge-model", messages, 0)
    assert sent["max_tokens"] > 0


def test_without_a_key_no_authorization_is_sent(judge, server):
    replace(judge, api_key=None).complete([])
    assert "Authorization" not in server.requests[0]["headers"]


@pytest.mark.parametrize(
    "failures",
    [
        [Reply("slow down", 429, {"Retry-After": "0"})],
        [Reply("slow down", 429)],
        [Reply("oops", 500), Reply("oops", 503)],
        [Reply(cut=True)],
        [Reply(body=b"")],
        [Reply(body=b"<html>a proxy's page</html>")],
        [Reply(body=b'{"error": {"message": "busy"}}'), Reply(body=b"[]")],
        [Reply("oops", 502, cut=True)],
    ],
    ids=["429 Retry-After", "429", "500 twice", "cut", "empty", "not JSON", "not the protocol", "502 cut"],
)
def test_passing_failure_is_tried_again(judge, server, failures):
    server.script = list(failures)
    assert judge.complete([]) == RATED
    assert len(server.requests) == len(failures) + 1


def test_silence_is_a_passing_failure(judge, server):
    server.script = [Reply(silent=1.0)]
    assert replace(judge, timeout=0.2).complete([]) == RATED
    assert len(server.requests) == 2


@pytest.fixture
def waits(monkeypatch):
    """How long the client would have waited, without the waiting."""
    waited: list[float] = []
    monkeypatch.setattr(endpoint_module, "time", SimpleNamespace(sleep=waited.append, time=time.time))
    return waited


def test_waits_double_and_are_spread(judge, server, waits):
    server.script = [Reply("oops", 500)] * 3
    replace(judge, base_delay=1.0).complete([])
    assert [low <= wait <= 2 * low for low, wait in zip((0.5, 1.0, 2.0), waits, strict=True)] == [True] * 3
    server.script = [Reply("oops", 500)] * 3
    first = list(waits)
    replace(judge, base_delay=1.0).complete([])
    assert waits[3:] != first


def test_retry_after_is_honoured_in_seconds_and_as_a_date_but_not_for_ever(judge, server, waits):
    for value in ("7", formatdate(time.time() + 30, usegmt=True), "86400", "soon", "nan", "-5"):
        server.script = [Reply("slow down", 429, {"Retry-After": value})]
        judge.complete([])
    assert waits[0] == 7
    assert 25 < waits[1] <= 30
    assert waits[2] == endpoint_module.LONGEST_WAIT
    assert all(wait <= 0.001 for wait in waits[3:])


def test_endpoint_that_stays_down_ends_with_what_it_said(judge, server):
    server.script = [Reply("overloaded", 503)] * 9
    with pytest.raises(JudgeError, match=r"127\.0\.0\.1.*status 503 overloaded \(4 attempts\)"):
        judge.complete([])
    assert len(server.requests) == 4


def test_endpoint_that_is_not_there_is_a_judge_error():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(JudgeError, match="ConnectionRefusedError"):
        Endpoint(f"http://127.0.0.1:{port}/v1", "m", retries=1, base_delay=0.001).complete([])


@pytest.mark.parametrize(
    ("status", "flag"),
    [
        (400, "--judge_model judge-model"),
        (401, "--judge_api_key_env"),
        (403, "--judge_api_key_env"),
        (404, "--judge_base_url"),
        (422, "--judge_model"),
    ],
)
def test_refusal_ends_at_once_and_names_the_flag(judge, server, status, flag):
    server.script = [Reply(f"it is\nwrong: {KEY}", status)]
    with pytest.raises(InputError) as raised:
        judge.complete([])
    assert str(raised.value).startswith(flag)
    assert "it is wrong: ***" in str(raised.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed_so_the_key_stays_here(judge, server, status):
    server.script = [Reply("elsewhere", status, {"Location": f"http://localhost:{server.server_port}/v1/x"})]
    with pytest.raises(InputError, match=r"--judge_base_url .*redirects"):
        judge.complete([])
    assert len(server.requests) == 1


def test_check_refuses_a_wrong_key_and_only_warns_of_an_absent_server(judge, server, caplog):
    server.script = [Reply("no", 401)]
    with pytest.raises(InputError, match="--judge_api_key_env"):
        judge.check()
    server.script = [Reply("loading", 503)]
    judge.check()
    assert "status 503 loading" in caplog.text
    assert len(server.requests) == 2
    judge.check()


def test_key_is_in_no_log_error_repr_or_file(judge, server, judged, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    assert KEY not in repr(judge)
    server.script = [
        Reply(f"bad {KEY}", 500),
        Reply(body=f"not JSON {KEY}".encode()),
        Reply(f"The key is {KEY}. [[3]]"),
        *[Reply(f"down {KEY}", 500)] * 4,
    ]
    with pytest.raises(JudgeError) as raised:
        judged()
    assert len(kept(tmp_path)) == 1
    assert "down ***" in caplog.text
    for text in (str(raised.value), caplog.text, (tmp_path / "judgements.jsonl").read_text()):
        assert KEY not in text


def test_address_model_and_key_come_from_the_flags(monkeypatch):
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    made = open_endpoint("https://api.example.org/v1/", "judge", "MY_KEY")
    assert (made.base_url, made.model, made.api_key) == ("https://api.example.org/v1", "judge", KEY)
    assert open_endpoint("http://[::1]:8000/v1", "judge", None).api_key is None


@pytest.mark.parametrize(
    ("url", "model", "variable", "words"),
    [
        ("api.example.org/v1", "m", None, "--judge_base_url"),
        ("ftp://host/v1", "m", None, "--judge_base_url"),
        ("file:///etc/passwd", "m", None, "--judge_base_url"),
        ("http://", "m", None, "--judge_base_url"),
        ("http://host:port/v1", "m", None, "--judge_base_url"),
        ("http://[::1/v1", "m", None, "--judge_base_url"),
        ("http://host/v1?key=1", "m", None, "--judge_base_url"),
        ("http://ho st/v1", "m", None, "--judge_base_url"),
        ("http://user:hunter2@host/v1", "m", None, "--judge_base_url"),
        ("http://host/v1", None, None, "--judge_model"),
        ("http://host/v1", "m", "NO_SUCH_KEY", "--judge_api_key_env NO_SUCH_KEY"),
        ("http://host/v1", "m", "EMPTY_KEY", "--judge_api_key_env EMPTY_KEY"),
        ("http://host/v1", "m", "ODD_KEY", "--judge_api_key_env ODD_KEY"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_in_one_line(monkeypatch, url, model, variable, words):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    monkeypatch.setenv("EMPTY_KEY", "  ")
    monkeypatch.setenv("ODD_KEY", "hunter2\nX-Header: 1")
    with pytest.raises(InputError, match=words) as raised:
        open_endpoint(url, model, variable)
    assert "hunter2" not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Rating: [[7]]", 7.0),
        ("I would say [[ 8.5 ]].", 8.5),
        ("Not [[5]] but [[10]]", 10.0),
        ("[[1]]", 1.0),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[-3]]", None),
        ("Rating: 7", None),
        ("[7]", None),
        ("[[rating]]", None),
        ("", None),
    ],
)
def test_rating_is_the_last_number_in_double_brackets_within_range(text, score):
    assert find_rating(text) == score


def test_judgement_without_a_rating_is_asked_for_again(judge, server):
    server.script = [Reply("It is fine."), Reply("Nine?"), Reply("[[9]]")]
    messages = judge_messages(["q"], ["a"])
    assert ask_for_rating(judge, messages) == (9.0, "It is fine.\n\nNine?\n\n[[9]]")
    assert [len(sent["messages"]) for sent in server.requests] == [2, 4, 6]
    assert server.requests[1]["messages"][:3] == [*messages, {"role": "assistant", "content": "It is fine."}]
    assert len(messages) == 2


def test_judge_that_never_rates_leaves_a_null_score_and_its_words(judge, server, judged, tmp_path, caplog):
    server.script = [Reply("Nice."), Reply(None), Reply("[[100]]")]
    first, second, *_ = judged()
    assert (first["score"], first["judgment"]) == (None, "Nice.\n\n\n\n[[100]]")
    assert second["score"] == 7
    assert "no rating for turn 1 of question 1" in caplog.text
    assert kept(tmp_path)[0] == first


def test_judgements_are_lines_for_every_turn(judged, tmp_path):
    rows = judged()
    assert kept(tmp_path) == rows
    assert [(row["question_id"], row["turn"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for row in rows:
        assert {"question_id", "model", "judge", "turn", "score", "judgment", "tstamp"} <= row.keys()
        assert (row["model"], row["judge"], row["score"], row["judgment"]) == ("tiny", "judge-model", 7.0, RATED)


def test_judge_sees_question_answer_and_the_reference_where_it_helps(judged, server):
    judged()
    math_1, math_2, writing_1, writing_2 = (
        "\n".join(message["content"] for message in sent["messages"]) for sent in server.requests
    )
    assert all(text in math_1 for text in ("What is 2 + 2?", "It is four.", "The first sum is 4.", "[[5]]"))
    assert not any(text in math_1 for text in ("And 3 + 3?", "It is seven.", "The second sum is 6."))
    for text in ("What is 2 + 2?", "It is four.", "The first sum is 4.", "And 3 + 3?", "It is seven.", "sum is 6."):
        assert text in math_2
    assert "last answer" in math_2
    assert "last answer" not in math_1
    assert "Write a line." in writing_1
    assert "A line {0}." in writing_1
    assert "Another {line}." in writing_2
    assert "eference" not in writing_1 + writing_2
    assert "Unused." not in writing_1 + writing_2


def test_missing_references_are_said_once(judged, caplog):
    judged(references={})
    assert caplog.text.count("no reference answers for 1 questions") == 1


@pytest.mark.parametrize("damage", ["after a line", "within a line"])
def test_interrupted_judging_goes_on_behind_what_is_there(judged, server, tmp_path, damage):
    server.script = [Reply("[[1]]"), Reply("[[2]]"), Reply("[[3]]"), Reply("[[4]]")]
    judged()
    path = tmp_path / "judgements.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + (lines[2][:20] if damage == "within a line" else b""))
    server.requests.clear()
    server.script = [Reply("[[5]]"), Reply("[[6]]")]
    assert [row["score"] for row in judged()] == [1, 2, 5, 6]
    assert len(server.requests) == 2
    assert judged() == kept(tmp_path)
    assert len(server.requests) == 2


def test_endpoint_that_goes_down_keeps_what_was_judged(judged, server, tmp_path):
    server.script = [Reply(), *[Reply("down", 500)] * 4]
    with pytest.raises(JudgeError, match=r"1 of 4 judgements are kept in .*judgements\.jsonl"):
        judged()
    assert len(kept(tmp_path)) == 1
    assert [row["score"] for row in judged()] == [7, 7, 7, 7]


def test_refusal_in_the_middle_keeps_what_was_judged(judged, server, tmp_path):
    server.script = [Reply(), Reply("quota", 403)]
    with pytest.raises(InputError, match="--judge_api_key_env"):
        judged()
    assert len(kept(tmp_path)) == 1


def test_other_answers_and_other_judges_are_judged_anew_and_nothing_is_lost(judged, judge, server, tmp_path):
    first = judged()
    server.script = [Reply("[[2]]")]
    changed = [ANSWERS[0], {**ANSWERS[1], "choices": [{"index": 0, "turns": ["A line {0}.", "New."]}]}]
    second = judged(changed)
    assert [row["score"] for row in second] == [7, 7, 7, 2]
    judged(by=replace(judge, model="another"))
    assert len(server.requests) == 4 + 1 + 4
    assert kept(tmp_path)[:4] == first


def test_half_a_surrogate_pair_can_be_kept(judged, server, tmp_path):
    server.script = [Reply(body=b'{"choices": [{"message": {"content": "\\ud83d [[4]]"}}]}')]
    assert judged()[0]["score"] == 4
    assert kept(tmp_path)[0]["judgment"] == "\ud83d [[4]]"


def test_other_processes_ask_nothing(judged, server, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.mtbench.judge.is_main", lambda: False)
    assert judged() == []
    assert not server.requests
    assert not kept(tmp_path)


def judgement(question_id: int, turn: int, score: float | None) -> dict:
    return {"question_id": question_id, "turn": turn, "score": score}


def test_summary_is_of_means_by_category_and_turn():
    questions = [*QUESTIONS, Question(3, "math", ("a", "b")), Question(4, "stem", ("a", "b"))]
    scores = {1: (8.0, 4.0), 2: (5.0, None), 3: (6.0, 3.0), 4: (None, None)}
    rows = [judgement(number, turn, score) for number, pair in scores.items() for turn, score in enumerate(pair, 1)]
    summary = summarize(rows, questions)
    assert summary == {
        "categories": {
            "math": {"turns": {"1": 7.0, "2": 3.5}, "average": 5.25},
            "writing": {"turns": {"1": 5.0, "2": None}, "average": 5.0},
            "stem": {"turns": {"1": None, "2": None}, "average": None},
        },
        "turns": {"1": pytest.approx(19 / 3), "2": 3.5},
        "average": pytest.approx(5.2),
        "judged": 8,
        "without_score": 3,
    }
    assert json.loads(json.dumps(summary)) == summary
    assert score_table(summary).splitlines() == [
        "| MT-Bench | turn 1 | turn 2 | average |",
        "| :------- | -----: | -----: | ------: |",
        "| math     |   7.00 |   3.50 |    5.25 |",
        "| writing  |   5.00 |      – |    5.00 |",
        "| stem     |      – |      – |       – |",
        "| all      |   6.33 |   3.50 |    5.20 |",
    ]


def test_summary_of_nothing_has_no_figures():
    summary = summarize([], QUESTIONS)
    assert (summary["average"], summary["turns"], summary["judged"]) == (None, {}, 0)
    assert score_table(summary).splitlines()[-1].startswith("| all")


def test_real_references_reach_the_judge(shared_data, server, judge, tmp_path):
    questions = read_questions(shared_data / "mt_bench/question.jsonl")
    references = read_references(shared_data / "mt_bench/reference_answer_gpt-4.jsonl")
    answers = [
        {"question_id": q.question_id, "model_id": "m", "choices": [{"index": 0, "turns": ["x", "y"]}]}
        for q in questions
    ]
    rows = judge_answers(judge, questions, answers, references, tmp_path / "judgements.jsonl")
    assert len(rows) == len(server.requests) == 160
    with_reference = sum("<reference" in sent["messages"][1]["content"] for sent in server.requests)
    assert with_reference == 60
    assert summarize(rows, questions)["average"] == 7
