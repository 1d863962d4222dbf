"""What a run says on the console and in its log."""

import io
import itertools
import logging
import os
import sys
from types import SimpleNamespace

import pytest

from utils import log
from utils.errors import InputError
from utils.log import RESULT, add_log_file, meter, progress, setup_console, shows_bars


@pytest.fixture(autouse=True)
def _restore_logging():
    """Put the root logger, and the levels of the libraries', back as they were."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    libraries = {
        name: logger.level for name, logger in logging.root.manager.loggerDict.items() if hasattr(logger, "level")
    }
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers, root.level = handlers, level
    for name, library_level in libraries.items():
        logging.getLogger(name).setLevel(library_level)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_yields_every_item_in_order(monkeypatch):
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(progress(["a", "b", "c"], "label")) == ["a", "b", "c"]


def test_progress_without_a_terminal_prints_plain_lines_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(log, "PLAIN_INTERVAL", 0.0)
    monkeypatch.setattr(log, "PLAIN_SHARE", 0.0)
    list(progress(range(3), "quantizing", unit="layer"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("quantizing: ") for line in lines)
    assert "1/3" in lines[0]
    assert "3/3" in lines[2]
    assert "layer" in lines[2]
    assert not any("\r" in line or "\x1b" in line for line in lines)


def test_progress_without_a_terminal_waits_between_lines(monkeypatch, capsys):
    clock = itertools.count(0, 4)  # seconds: every item takes four
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    list(progress(range(7), "quantizing"))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("| ")[1].split(" ")[0] for line in lines] == ["3/7", "6/7"]


def test_progress_that_is_over_soon_prints_nothing_without_a_terminal(capsys):
    list(progress(range(100), "quantizing"))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    list(progress(range(2), "quantizing"))
    assert "quantizing" in terminal.getvalue()
    assert "\r" in terminal.getvalue()


def test_progress_passes_exceptions_of_the_loop_on():
    def loop() -> None:
        for item in progress(range(3), "label"):
            raise KeyError(item)

    with pytest.raises(KeyError):
        loop()


def test_progress_takes_longer_between_lines_the_longer_the_work_lasts(monkeypatch, capsys):
    clock = itertools.count(0, 4)
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    list(progress(range(900), "quantizing"))  # an hour
    counts = [int(line.rpartition("| ")[2].split("/")[0]) for line in capsys.readouterr().err.splitlines()]
    pauses = [4 * (after - before) for before, after in itertools.pairwise([0, *counts])]
    assert pauses[:10] == [12] * 10
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(0.05 * 3600, abs=20)
    assert len(counts) < 80


def test_steps_within_a_step_are_a_second_bar_and_vanish(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    setup_console()
    for _ in progress(range(1), "layers"):
        with meter(2, "clipping", "epoch", inner=True) as bar:
            bar.set_postfix_str("loss 0.5")
            bar.update(2)
    drawn = terminal.getvalue()
    assert "loss 0.5" in drawn
    assert "\x1b[A" in drawn  # it is below the other one
    assert drawn.endswith("\r")
    assert drawn.rstrip("\r").endswith(" ")  # wiped


def test_steps_within_a_step_say_something_every_minute_without_a_terminal(monkeypatch, capsys):
    clock = itertools.count(0, 25)
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with meter(6, "clipping", "epoch", inner=True) as bar:
        for epoch in range(6):
            bar.set_postfix_str(f"loss {epoch}")
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("| ")[1].split(" ")[0] for line in lines] == ["3/6", "6/6"]
    assert "loss 2" in lines[0]


def test_a_quiet_console_has_no_progress(monkeypatch, capsys):
    setup_console(quiet=True)
    monkeypatch.setattr(log, "PLAIN_INTERVAL", 0.0)
    monkeypatch.setattr(log, "PLAIN_SHARE", 0.0)
    list(progress(range(3), "quantizing"))
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    list(progress(range(3), "quantizing"))
    with meter(3, "clipping", inner=True) as bar:
        bar.set_postfix_str("loss")
        bar.update()
    assert terminal.getvalue() == ""
    assert not shows_bars()


def test_only_the_main_process_has_progress(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    setup_console()
    monkeypatch.setattr(log, "PLAIN_INTERVAL", 0.0)
    monkeypatch.setattr(log, "PLAIN_SHARE", 0.0)
    assert list(progress(range(3), "quantizing")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_bars_of_libraries_are_drawn_only_where_ours_are(monkeypatch):
    for variable in log.LIBRARY_BARS:
        monkeypatch.setenv(variable, "set and removed, so that it is put back")
        monkeypatch.delenv(variable)
    monkeypatch.setattr(sys, "stderr", Terminal())
    setup_console()
    assert not any(variable in os.environ for variable in log.LIBRARY_BARS)
    setup_console(quiet=True)
    assert all(os.environ[variable] == "1" for variable in log.LIBRARY_BARS)


def test_warnings_and_errors_go_to_stderr_and_everything_else_to_stdout(capsys):
    setup_console()
    logging.getLogger("quantize.walk").info("layer 0")
    logging.getLogger("quantize.walk").warning("odd")
    logging.getLogger().error("error: wrong")
    captured = capsys.readouterr()
    assert captured.out == "layer 0\n"
    assert captured.err == "odd\nerror: wrong\n"


def test_libraries_are_quiet_and_setting_up_twice_says_things_once(capsys):
    setup_console()
    setup_console()
    logging.getLogger("transformers").warning("noise")
    logging.getLogger("huggingface_hub").info("noise")
    logging.getLogger("main").info("once")
    assert capsys.readouterr().out == "once\n"


def test_a_quiet_console_has_results_and_warnings_and_the_log_file_everything(tmp_path, capsys):
    setup_console(quiet=True)
    add_log_file(tmp_path / "log.txt")
    logging.getLogger("main").info("detail")
    logging.getLogger("main").log(RESULT, "perplexity 5.47")
    logging.getLogger("main").warning("odd")
    captured = capsys.readouterr()
    assert captured.out == "perplexity 5.47\n"
    assert captured.err == "odd\n"
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["detail", "perplexity 5.47", "odd"]


def test_a_log_file_gets_the_same_lines_with_the_time_and_keeps_what_it_had(tmp_path):
    path = tmp_path / "deep/log.txt"
    path.parent.mkdir()
    path.write_text("an earlier run\n")
    setup_console()
    add_log_file(path)
    logging.getLogger("main").info("perplexity 5.47 → 6.28")
    earlier, line = path.read_text(encoding="utf-8").splitlines()
    assert earlier == "an earlier run"
    assert line.endswith(" perplexity 5.47 → 6.28")
    assert line[:4].isdigit()


def test_a_log_file_that_cannot_be_written_names_the_flag(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"log\.txt: cannot be written \(.*--output_dir"):
        add_log_file(tmp_path / "file/log.txt")
