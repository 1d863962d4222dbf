"""What an unfinished evaluation keeps."""

import json

from evaluation.journal import Journal

IDENTITY = {"model": "m", "limit": 3}


def test_a_new_journal_is_empty_and_writes_nothing(tmp_path):
    journal = Journal(tmp_path / "unfinished.jsonl", IDENTITY)
    assert journal.parts == 0
    assert "a" not in journal
    assert journal.get("a") is None
    assert not journal.path.exists()


def test_what_is_kept_is_found_by_the_next_run_of_the_same(tmp_path):
    first = Journal(tmp_path / "deep/unfinished.jsonl", IDENTITY)
    first.keep("a", {"accuracy": 0.5, "text": "ü"})
    first.keep("b", None)
    second = Journal(first.path, dict(reversed(IDENTITY.items())))
    assert second.parts == 2
    assert second.get("a") == {"accuracy": 0.5, "text": "ü"}
    assert "b" in second


def test_another_identity_finds_nothing_and_starts_anew(tmp_path):
    Journal(tmp_path / "j", IDENTITY).keep("a", 1)
    other = Journal(tmp_path / "j", {**IDENTITY, "limit": 4})
    assert "a" not in other
    other.keep("b", 2)
    assert Journal(tmp_path / "j", IDENTITY).parts == 0
    assert Journal(tmp_path / "j", {**IDENTITY, "limit": 4}).get("b") == 2


def test_a_last_line_that_was_cut_off_is_forgotten_and_nothing_is_appended_to_it(tmp_path):
    path = tmp_path / "j"
    journal = Journal(path, IDENTITY)
    journal.keep("a", 1)
    journal.keep("b", 2)
    path.write_bytes(path.read_bytes()[:-5])
    again = Journal(path, IDENTITY)
    assert ("a" in again, "b" in again) == (True, False)
    again.keep("c", 3)
    again.keep("d", 4)
    assert [json.loads(line).get("key") for line in path.read_text().splitlines()] == [None, "a", "c", "d"]


def test_a_section_keeps_its_entries_apart(tmp_path):
    journal = Journal(tmp_path / "j", IDENTITY)
    journal.under("full").keep("a", 1)
    journal.under("quantized").keep("a", 2)
    again = Journal(tmp_path / "j", IDENTITY)
    assert [again.under(row).get("a") for row in ("full", "quantized", "rtn")] == [1, 2, None]
    assert ("a" in again.under("full"), "a" in again.under("rtn"), "a" in again) == (True, False, False)


def test_a_closed_journal_is_gone(tmp_path):
    journal = Journal(tmp_path / "j", IDENTITY)
    journal.keep("a", 1)
    journal.close()
    assert not journal.path.exists()
    Journal(tmp_path / "never written", IDENTITY).close()
