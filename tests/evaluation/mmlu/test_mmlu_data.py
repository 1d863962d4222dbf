"""MMLU's files and the prompts that are made of them."""

import pytest
from mmlu_cases import NAMES, make_subject, write_folder

from evaluation.mmlu.data import Question, Subject, digest, prompt, read_mmlu
from evaluation.mmlu.subjects import CATEGORIES, CATEGORY_OF
from utils.errors import InputError


def test_what_was_written_is_read_by_name(tmp_path):
    subjects = tuple(make_subject(name) for name in NAMES)
    assert read_mmlu(write_folder(tmp_path, subjects[::-1])) == subjects


def test_quotes_line_ends_and_byte_order_marks_are_read_as_csv_has_them(tmp_path):
    (tmp_path / "test").mkdir()
    text = '\ufeff"He said ""no"",\nor so?",one,"two, three",,None,D \n\nnext,a,b,c,d,A'
    (tmp_path / "test/anatomy_test.csv").write_bytes(text.encode())
    (subject,) = read_mmlu(tmp_path, 0)
    assert subject.questions == (
        Question('He said "no",\nor so?', ("one", "two, three", "", "None"), "D"),
        Question("next", ("a", "b", "c", "d"), "A"),
    )


GOOD = b'"two\nlines",a,b,c,d,A\n'
BAD_ROWS = {
    "five columns": (b"q,a,b,c,A\n", ":3: 5 columns"),
    "seven columns": (b"q,a,b,c,d,e,A\n", ":3: 7 columns"),
    "no letter": (b"q,a,b,c,d,E\n", ":3: the answer is 'E'"),
    "two letters": (b"q,a,b,c,d,AB\n", ":3: the answer is 'AB'"),
    "no answer": (b"q,a,b,c,d,\n", ":3: the answer is ''"),
    "not UTF-8": (b"q,a,b,\xe9,d,A\n", ":3: not UTF-8 text (byte 0xe9)"),
    "a quote that does not end": (b'"q,a,b,c,d,A\n', ":3: not a row of a CSV file"),
}


@pytest.mark.parametrize("split", ["dev", "test"])
@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_cannot_be_used_is_named_with_its_line(row, message, split, tmp_path):
    write_folder(tmp_path, (make_subject(),))
    path = tmp_path / split / f"anatomy_{split}.csv"
    path.write_bytes(GOOD + row)
    with pytest.raises(InputError) as error:
        read_mmlu(tmp_path)
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


def test_missing_folders_and_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"--mmlu_data_dir .*nowhere: no such folder"):
        read_mmlu(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"there is no test/<subject>_test\.csv"):
        read_mmlu(tmp_path)
    write_folder(tmp_path, (make_subject(),))
    with pytest.raises(InputError, match=r"anatomy_dev\.csv: 6-shot prompts need 6 examples, it has 5"):
        read_mmlu(tmp_path, 6)
    (tmp_path / "dev/anatomy_dev.csv").unlink()
    with pytest.raises(InputError, match=r"anatomy_dev\.csv: no such file; 5-shot"):
        read_mmlu(tmp_path)
    assert read_mmlu(tmp_path, 0)[0].examples == ()
    (tmp_path / "test/anatomy_test.csv").write_text("\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"anatomy_test\.csv: holds no question"):
        read_mmlu(tmp_path, 0)


def test_the_57_subjects_are_counted_as_in_the_original():
    sizes = [sum(category == name for category in CATEGORY_OF.values()) for name in CATEGORIES]
    assert dict(zip(CATEGORIES, sizes, strict=True)) == {
        "STEM": 18, "humanities": 13, "social sciences": 12, "other (business, health, misc.)": 14,
    }  # fmt: skip


def test_the_real_files_are_read_whole(shared_data):
    subjects = read_mmlu(shared_data / "mmlu")
    sizes = dict.fromkeys(CATEGORIES, 0)
    for subject in subjects:
        sizes[subject.category] += len(subject.questions)
    assert list(sizes.values()) == [3018, 4705, 3077, 3242]
    assert {len(subject.examples) for subject in subjects} == {5}


def test_the_digest_changes_with_any_word():
    one, other = make_subject(), make_subject("anatomy", 8)
    assert digest((one,)) == digest((make_subject(),)) != digest((other,))


def test_the_prompt_is_the_original_s():
    subject = Subject(
        "abstract_algebra",
        (Question("One?", ("1", "2", "3", "4"), "C"), Question("Two?", ("5", "6", "7", "8"), "A")),
        (Question("Three?", ("9", "10", "11", "12"), "B"),),
    )
    header = "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    one = "One?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: C\n\n"
    two = "Two?\nA. 5\nB. 6\nC. 7\nD. 8\nAnswer: A\n\n"
    asked = "Three?\nA. 9\nB. 10\nC. 11\nD. 12\nAnswer:"
    texts = [prompt(subject, subject.questions[0], shots) for shots in (0, 1, 2)]
    assert texts == [header + asked, header + one + asked, header + one + two + asked]
