import gzip
import json
import logging
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from utils import data
from utils.errors import InputError

SHARED = ROOT.parent / "shared"

WORDS = 400  # the tokenizers' vocabulary is w0 … w399 with ids that follow the numbers


def make_tokenizer(shift=0, bos=False, calls=None):
    """A tokenizer that maps the word w<n> to the id n + shift modulo WORDS, and counts its calls."""
    vocabulary = {f"w{n}": (n + shift) % WORDS for n in range(WORDS)}
    backend = Tokenizer(models.WordLevel({**vocabulary, "<unk>": WORDS, "<s>": WORDS + 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", WORDS + 1)])

    class Counting(PreTrainedTokenizerFast):
        def __call__(self, text, **options):
            if calls is not None:
                calls.append(text)
            return super().__call__(text, **options)

    return Counting(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", model_max_length=16)


def words(start, stop):
    return " ".join(f"w{n % WORDS}" for n in range(start, stop))


def is_contiguous(window):
    return bool((window.diff() % WORDS == 1).all())


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(words(0, 1000))
    return path


def calibrate(dataset, tokenizer, tmp_path, nsamples=4, seqlen=8, seed=0, **options):
    return data.calibration_tokens(
        str(dataset), tokenizer, nsamples=nsamples, seqlen=seqlen, seed=seed, cache_dir=tmp_path / "cache", **options
    )


def cut_test(dataset, tokenizer, tmp_path, seqlen=8, **options):
    return data.test_tokens(str(dataset), tokenizer, seqlen=seqlen, cache_dir=tmp_path / "cache", **options)


def message(call, *arguments, **options):
    """The error of a call, which must be one line."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_json_lines(path, documents, column="text"):
    path.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(documents)))
    return path


# windows of a stream


def test_calibration_windows_are_contiguous_pieces_of_the_text(tokenizer, text_file, tmp_path):
    tokens = calibrate(text_file, tokenizer, tmp_path, nsamples=20)
    assert tokens.shape == (20, 8)
    assert tokens.dtype == torch.int64
    assert all(is_contiguous(window) for window in tokens)


def test_the_same_seed_draws_the_same_windows_and_another_seed_others(tokenizer, text_file, tmp_path):
    first, again = (calibrate(text_file, tokenizer, tmp_path / where, seed=1) for where in "ab")
    other = calibrate(text_file, tokenizer, tmp_path, seed=2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_seed_draws_the_windows_that_the_field_draws(tokenizer, text_file, tmp_path):
    field = random.Random(3)
    starts = [field.randint(0, 1000 - 8 - 1) for _ in range(4)]
    assert calibrate(text_file, tokenizer, tmp_path, seed=3)[:, 0].tolist() == [start % WORDS for start in starts]


def test_drawing_leaves_the_global_random_state_alone(tokenizer, text_file, tmp_path):
    state = random.getstate()
    calibrate(text_file, tokenizer, tmp_path)
    assert random.getstate() == state


def test_test_windows_do_not_overlap_and_the_rest_is_dropped(tokenizer, tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(words(0, 30))
    assert torch.equal(cut_test(path, tokenizer, tmp_path), torch.arange(24).view(3, 8))


def test_a_text_of_exactly_the_tokens_asked_for_is_enough(tokenizer, tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(words(0, 8))
    assert torch.equal(calibrate(path, tokenizer, tmp_path, nsamples=1), torch.arange(8)[None])
    assert torch.equal(cut_test(path, tokenizer, tmp_path), torch.arange(8)[None])


def test_the_tokenizers_special_tokens_begin_the_stream(text_file, tmp_path):
    tokens = cut_test(text_file, make_tokenizer(bos=True), tmp_path)
    assert tokens[0].tolist() == [WORDS + 1, *range(7)]
    assert WORDS + 1 not in tokens[1:]


def test_a_text_file_is_used_to_the_byte(tmp_path):
    path = tmp_path / "story.txt"
    path.write_bytes(b"a\r\nb\n\n c")
    backend = Tokenizer(models.WordLevel({byte: n for n, byte in enumerate("\n\r abc")}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokens = cut_test(path, PreTrainedTokenizerFast(tokenizer_object=backend), tmp_path)
    assert tokens.tolist() == [["\n\r abc".index(char) for char in "a\r\nb\n\n c"]]


def test_long_texts_cause_no_warning_about_the_models_maximum(text_file, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    cut_test(text_file, make_tokenizer(), tmp_path)
    assert not caplog.records


# corpora and their protocols, on local copies


@pytest.mark.parametrize(("name", "column", "separator"), [("wikitext2", "text", "\n\n"), ("ptb", "sentence", " ")])
def test_a_named_corpus_joins_the_documents_of_a_local_copy_in_its_way(name, column, separator, tmp_path):
    calls = []
    path = write_json_lines(tmp_path / "copy.jsonl", [words(0, 50), "", words(50, 100)], column)
    tokens = cut_test(f"{name}={path}", make_tokenizer(calls=calls), tmp_path)
    assert calls == [separator.join([words(0, 50), "", words(50, 100)])]
    assert torch.equal(tokens, torch.arange(96).view(12, 8))
    calibrate(f"{name}={path}", make_tokenizer(calls=calls), tmp_path)
    assert len(calls) == 2
    assert calls[0] == calls[1]


@pytest.fixture
def documents(tmp_path):
    """A file of 1200 documents: every fourth has 30 words, the others 6."""
    texts = [words(i, i + (30 if i % 4 == 0 else 6)) for i in range(1200)]
    return write_json_lines(tmp_path / "documents.jsonl", texts)


@pytest.mark.parametrize("name", ["c4", "c4-new", "pile"])
def test_document_corpora_calibrate_within_single_long_documents(name, documents, tokenizer, tmp_path):
    tokens = calibrate(f"{name}={documents}", tokenizer, tmp_path, nsamples=50)
    assert tokens.shape == (50, 8)
    assert all(is_contiguous(window) for window in tokens)


def test_short_documents_are_tokenised_once_at_most(documents, tmp_path):
    calls = []
    calibrate(f"c4={documents}", make_tokenizer(calls=calls), tmp_path, nsamples=2000)
    assert max(count for text, count in Counter(calls).items() if text.count(" ") == 5) <= 3  # 3 documents, one text


def test_c4_tests_on_256_windows_within_documents_drawn_with_seed_20(documents, tokenizer, tmp_path):
    tokens = cut_test(f"c4={documents}", tokenizer, tmp_path)
    assert tokens.shape == (256, 8)
    assert all(is_contiguous(window) for window in tokens)
    rng, starts = random.Random(20), []
    while len(starts) < 256:
        document = rng.randint(0, 1200 - 1)
        if document % 4 == 0:
            starts.append(document + rng.randint(0, 30 - 8 - 1))
    assert tokens[:, 0].tolist() == [start % WORDS for start in starts]


def test_c4_new_tests_on_the_first_1100_documents_joined(documents, tmp_path):
    calls = []
    tokens = cut_test(f"c4-new={documents}", make_tokenizer(calls=calls), tmp_path, seqlen=16)
    stream = torch.tensor([int(word[1:]) for word in calls[0].split(" ")])
    assert len(calls) == 1
    assert len(stream) == 275 * 30 + 825 * 6
    assert torch.equal(tokens.flatten(), stream[: 256 * 16])


def test_c4_and_c4_new_test_on_different_windows(documents, tokenizer, tmp_path):
    c4, c4_new = (cut_test(f"{name}={documents}", tokenizer, tmp_path) for name in ("c4", "c4-new"))
    assert c4.shape == c4_new.shape
    assert not torch.equal(c4, c4_new)


def test_documents_all_too_short_name_the_flag(documents, tokenizer, tmp_path):
    for error in (
        message(calibrate, f"pile={documents}", tokenizer, tmp_path, seqlen=30),
        message(cut_test, f"c4={documents}", tokenizer, tmp_path, seqlen=30),
    ):
        assert "documents are too short for windows of 30" in error
        assert "lower --seqlen" in error
        assert str(documents) in error


def test_corpora_of_documents_refuse_a_single_text(tokenizer, text_file, tmp_path):
    for name in ("c4", "c4-new", "pile"):
        assert "a .txt is one text" in message(calibrate, f"{name}={text_file}", tokenizer, tmp_path)
    assert "a .txt is one text" in message(cut_test, f"c4={text_file}", tokenizer, tmp_path)


def test_calibration_corpora_refuse_to_test(tokenizer, documents, tmp_path):
    for dataset in ("pile", "mix", f"pile={documents}"):
        error = message(cut_test, dataset, tokenizer, tmp_path)
        assert "is for calibration only; choose wikitext2, ptb, c4, c4-new" in error
        assert "--test_dataset" in error


def test_mix_has_no_local_copy(tokenizer, documents, tmp_path):
    assert "mix has no local copy" in message(calibrate, f"mix={documents}", tokenizer, tmp_path)


def test_mix_of_fewer_windows_than_corpora_is_refused(tokenizer, tmp_path):
    assert "--nsamples 2" in message(calibrate, "mix", tokenizer, tmp_path, nsamples=2)


# local formats


def save_parquet(path, columns):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)


LOCAL_DOCUMENTS = [words(0, 20), words(20, 40)]


def local_copy(kind, folder):
    path = folder / f"copy{kind}"
    if kind == ".parquet":
        save_parquet(path, {"id": [1, 2], "text": LOCAL_DOCUMENTS})
    elif kind == "_folder":
        pytest.importorskip("datasets").Dataset.from_dict({"text": LOCAL_DOCUMENTS}).save_to_disk(path)
    else:
        write_json_lines(path, LOCAL_DOCUMENTS)
        if kind.endswith(".gz"):
            path.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        elif kind.endswith(".zst"):
            content = path.read_bytes()
            with pytest.importorskip("pyarrow").output_stream(str(path), compression="zstd") as file:
                file.write(content)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".json.gz", ".jsonl.zst", ".parquet", "_folder"])
def test_documents_of_every_local_format_are_joined_by_blank_lines(kind, tmp_path):
    calls = []
    path = local_copy(kind, tmp_path)
    tokens = cut_test(path, make_tokenizer(calls=calls), tmp_path)
    assert calls == ["\n\n".join(LOCAL_DOCUMENTS)]
    assert torch.equal(tokens, torch.arange(40).view(5, 8))
    assert calibrate(path, make_tokenizer(), tmp_path).shape == (4, 8)
    assert data.dataset_label(str(path)) == path.name.partition(".")[0]


def save_splits(path, **splits):
    datasets = pytest.importorskip("datasets")
    saved = {name: datasets.Dataset.from_dict({"text": [text]}) for name, text in splits.items()}
    datasets.DatasetDict(saved).save_to_disk(path)
    return path


def test_a_saved_folder_gives_train_for_calibration_and_test_for_testing(tokenizer, tmp_path):
    path = save_splits(tmp_path / "saved", train=words(0, 50), validation=words(100, 150), test=words(200, 250))
    assert calibrate(path, tokenizer, tmp_path).max() < 50
    assert cut_test(path, tokenizer, tmp_path).min() == 200


def test_a_saved_folder_falls_back_to_validation_and_to_its_only_split(tokenizer, tmp_path):
    path = save_splits(tmp_path / "two", train=words(0, 50), validation=words(100, 150))
    assert cut_test(path, tokenizer, tmp_path).min() == 100
    path = save_splits(tmp_path / "one", story=words(300, 350))
    assert cut_test(path, tokenizer, tmp_path).min() == 300
    assert calibrate(path, tokenizer, tmp_path).min() >= 300


def test_a_saved_folder_without_a_usable_split_lists_what_it_has(tokenizer, tmp_path):
    path = save_splits(tmp_path / "saved", story=words(0, 50), tale=words(0, 50))
    assert "story, tale" in message(cut_test, path, tokenizer, tmp_path)


def test_the_only_column_of_strings_is_taken(tokenizer, tmp_path):
    save_parquet(tmp_path / "a.parquet", {"id": [1], "story": [words(0, 20)]})
    write_json_lines(tmp_path / "b.jsonl", [words(0, 20)], column="story")
    for name in ("a.parquet", "b.jsonl"):
        assert torch.equal(cut_test(tmp_path / name, tokenizer, tmp_path), torch.arange(16).view(2, 8))


def test_an_ambiguous_column_lists_the_columns(tokenizer, tmp_path):
    save_parquet(tmp_path / "a.parquet", {"number": [1], "tale": ["w1"], "story": ["w2"]})
    (tmp_path / "b.jsonl").write_text('{"number": 1, "tale": "w1", "story": "w2"}\n')
    for name in ("a.parquet", "b.jsonl"):
        assert "number, tale, story" in message(cut_test, tmp_path / name, tokenizer, tmp_path)


def test_text_and_json_lines_and_tokens_need_neither_datasets_nor_pyarrow(tokenizer, text_file, tmp_path, monkeypatch):
    for module in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    jsonl = write_json_lines(tmp_path / "copy.jsonl", [words(0, 40)])
    save_file({"test": torch.arange(16).view(2, 8)}, tmp_path / "tokens.safetensors")
    for path in (text_file, jsonl, tmp_path / "tokens.safetensors"):
        assert cut_test(path, tokenizer, tmp_path).shape[1] == 8
    (tmp_path / "copy.parquet").write_bytes(b"PAR1")
    assert 'pip install "pyarrow==' in message(cut_test, tmp_path / "copy.parquet", tokenizer, tmp_path)


# files of tokens


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "tokens.safetensors"
    calibration = torch.arange(60, dtype=torch.int32).view(6, 10)
    save_file({"calibration": calibration, "test": calibration[:3] + 100, "loss": torch.zeros(2, 2)}, path)
    return path


def test_token_files_bring_their_shape(token_file, tokenizer, tmp_path):
    tokens = calibrate(token_file, tokenizer, tmp_path, nsamples=None, seqlen=None)
    assert torch.equal(tokens, torch.arange(60).view(6, 10))
    assert torch.equal(cut_test(token_file, tokenizer, tmp_path, seqlen=None), torch.arange(100, 130).view(3, 10))
    assert not (tmp_path / "cache").exists()


def test_token_files_are_cut_to_first_rows_and_columns(token_file, tokenizer, tmp_path):
    tokens = calibrate(token_file, tokenizer, tmp_path, nsamples=2, seqlen=3)
    assert tokens.tolist() == [[0, 1, 2], [10, 11, 12]]
    assert cut_test(token_file, tokenizer, tmp_path, seqlen=3).shape == (3, 3)


def test_token_files_smaller_than_asked_name_the_flag_and_both_numbers(token_file, tokenizer, tmp_path):
    error = message(calibrate, token_file, tokenizer, tmp_path, nsamples=7, seqlen=None)
    assert "--nsamples 7" in error
    assert "6 rows" in error
    for error in (
        message(calibrate, token_file, tokenizer, tmp_path, nsamples=None, seqlen=11),
        message(cut_test, token_file, tokenizer, tmp_path, seqlen=11),
    ):
        assert "--seqlen 11" in error
        assert "10 columns" in error


def test_token_ids_outside_the_vocabulary_are_refused(token_file, text_file, tokenizer, tmp_path):
    assert "token id 127 is outside the vocabulary of 120" in message(
        cut_test, token_file, tokenizer, tmp_path, vocab_size=120
    )
    assert "outside the vocabulary of 200" in message(cut_test, text_file, tokenizer, tmp_path, vocab_size=200)
    for bad in (-1, WORDS + 2):
        save_file({"test": torch.tensor([[0, bad]])}, tmp_path / "bad.safetensors")
        error = message(cut_test, tmp_path / "bad.safetensors", tokenizer, tmp_path, seqlen=None)
        assert f"token id {bad} " in error


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(2, 2), "float32 [2, 2]"),
        (torch.zeros(2, 2, dtype=torch.bool), "bool [2, 2]"),
        (torch.zeros(4, dtype=torch.int64), "int64 [4]"),
        (torch.zeros(0, 4, dtype=torch.int64), "int64 [0, 4]"),
    ],
)
def test_token_tensors_of_the_wrong_kind_are_described(tensor, said, tokenizer, tmp_path):
    save_file({"test": tensor}, tmp_path / "bad.safetensors")
    assert said in message(cut_test, tmp_path / "bad.safetensors", tokenizer, tmp_path)


def test_token_files_without_the_tensor_list_what_they_have(tokenizer, tmp_path):
    save_file({"tokens": torch.ones(2, 8, dtype=torch.int64)}, tmp_path / "bad.safetensors")
    error = message(calibrate, tmp_path / "bad.safetensors", tokenizer, tmp_path)
    assert "no tensor 'calibration'" in error
    assert "it has tokens" in error


def test_a_damaged_token_file_is_one_line(tokenizer, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"not safetensors at all")
    assert "not a readable safetensors file" in message(cut_test, tmp_path / "bad.safetensors", tokenizer, tmp_path)


# bad input


def test_too_few_tokens_name_both_numbers_and_the_flags(text_file, tokenizer, tmp_path):
    error = message(calibrate, text_file, tokenizer, tmp_path, nsamples=100, seqlen=16)
    assert all(part in error for part in ("1000 tokens", "1600", "--nsamples 100", "of 16", "--seqlen", str(text_file)))
    error = message(cut_test, text_file, tokenizer, tmp_path, seqlen=1001)
    assert all(part in error for part in ("1000 tokens", "of 1001", "--seqlen"))


def test_an_unknown_name_lists_the_known_ones(tokenizer, tmp_path):
    for call in (calibrate, cut_test):
        error = message(call, "wikitxt", tokenizer, tmp_path)
        assert "wikitext2, ptb, c4, c4-new, pile, mix" in error
        assert "path" in error
    assert "wikitext2, ptb, c4" in message(calibrate, "wikitxt=story.txt", tokenizer, tmp_path)
    assert "no path after '='" in message(calibrate, "c4=", tokenizer, tmp_path)


def test_a_missing_path_names_path_and_flag(tokenizer, tmp_path):
    for dataset in (tmp_path / "absent.txt", f"c4={tmp_path / 'absent.parquet'}", tmp_path / "absent"):
        error = message(cut_test, dataset, tokenizer, tmp_path)
        assert "absent" in error
        assert "no such file or folder (given to --test_dataset)" in error


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n ", "holds no text"),
        ("a.txt", b"caf\xe9 w1", "not UTF-8 text (byte 0xe9 at 3)"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": "w1"}\n\n{"text": w2}\n', "line 3: not JSON"),
        ("a.jsonl", b'{"text": "w1"}\n"w2"\n', "line 2: one JSON object per line is wanted, this is a str"),
        ("a.jsonl", b'{"text": "w1"}\n{"title": "w2"}\n', "line 2: no text in column 'text'"),
        ("a.jsonl", b'{"text": "w1"}\n{"text": "\xff"}\n', "line 2: not UTF-8 text"),
        ("a.json", b'[\n{"text": "w1"}]\n', "line 1: not JSON"),
        ("a.json.gz", b"plain", "cannot be read (BadGzipFile"),
        ("a.json.gz", gzip.compress(b'{"text": "w1"}\n' * 9, mtime=0)[:-9], "damaged or cut off"),
        ("a.csv", b"text\nw1\n", "unknown kind of file"),
    ],
)
def test_unusable_files_are_described_in_one_line(name, content, said, tokenizer, tmp_path):
    (tmp_path / name).write_bytes(content)
    for call in (calibrate, cut_test):
        error = message(call, tmp_path / name, tokenizer, tmp_path)
        assert said in error
        assert str(tmp_path / name) in error


def test_unusable_parquet_and_folders_are_described_in_one_line(tokenizer, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    save_parquet(tmp_path / "gap.parquet", {"text": ["w1", None]})
    (tmp_path / "folder").mkdir()
    pytest.importorskip("datasets")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    for name, said in [
        ("a.parquet", "not a readable parquet file"),
        ("gap.parquet", "row 2: no text in column 'text'"),
        ("folder", "not a folder saved by datasets' save_to_disk"),
        ("broken", "not a readable folder of datasets' save_to_disk"),
    ]:
        assert said in message(cut_test, tmp_path / name, tokenizer, tmp_path)


# the cache


def cached_files(tmp_path):
    return sorted((tmp_path / "cache").glob("tokens_*.safetensors"))


def test_a_cached_result_is_read_without_tokenising(text_file, tmp_path):
    calls = []
    tokenizer = make_tokenizer(calls=calls)
    first = [calibrate(text_file, tokenizer, tmp_path), cut_test(text_file, tokenizer, tmp_path)]
    assert len(calls) == len(cached_files(tmp_path)) == 2
    again = [calibrate(text_file, tokenizer, tmp_path), cut_test(text_file, make_tokenizer(calls=calls), tmp_path)]
    assert len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_two_tokenizers_never_share_cached_tokens(text_file, tmp_path):
    tokenizers = [make_tokenizer(), make_tokenizer(shift=1), make_tokenizer(bos=True)]
    results = [cut_test(text_file, tokenizer, tmp_path) for tokenizer in tokenizers]
    assert len(cached_files(tmp_path)) == 3
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_tokenizers_in_python_differ_by_vocabulary_files_and_flags(tmp_path):
    class Slow(PreTrainedTokenizer):
        vocab_files_names = {"merges_file": "merges.txt"}  # noqa: RUF012 - as transformers has it

        def __init__(self, vocabulary, merges_file, **options):
            self.vocabulary, self.merges_file = vocabulary, str(merges_file)
            super().__init__(**options)

        vocab_size = property(lambda self: len(self.vocabulary))

        def get_vocab(self):
            return dict(self.vocabulary)

        def _convert_token_to_id(self, token):
            return self.vocabulary.get(token, 0)

    merges = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in merges:
        path.write_text(path.name)
    digests = [
        data.tokenizer_digest(tokenizer)
        for tokenizer in (
            Slow({"a": 0, "b": 1}, merges[0]),
            Slow({"a": 1, "b": 0}, merges[0]),
            Slow({"a": 0, "b": 1}, merges[1]),
            Slow({"a": 0, "b": 1}, merges[0], bos_token="<s>"),
        )
    ]
    assert len(set(digests)) == 4
    assert digests[0] == data.tokenizer_digest(Slow({"b": 1, "a": 0}, merges[0]))


def test_tokenising_does_not_change_a_tokenizers_digest():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding()
    before = data.tokenizer_digest(tokenizer)
    assert len(tokenizer(words(0, 9)).input_ids) == 9
    assert data.tokenizer_digest(tokenizer) == before


def test_every_choice_has_its_own_cache_entry(text_file, tokenizer, tmp_path):
    calibrate(text_file, tokenizer, tmp_path)
    calibrate(text_file, tokenizer, tmp_path, seed=1)
    calibrate(text_file, tokenizer, tmp_path, nsamples=5)
    calibrate(text_file, tokenizer, tmp_path, seqlen=9)
    calibrate(f"wikitext2={text_file}", tokenizer, tmp_path)
    cut_test(text_file, tokenizer, tmp_path)
    assert len(cached_files(tmp_path)) == 6


def test_the_cache_follows_content_not_paths(text_file, tokenizer, tmp_path):
    before = cut_test(text_file, tokenizer, tmp_path)
    copy = text_file.rename(tmp_path / "renamed.txt")
    assert torch.equal(cut_test(copy, tokenizer, tmp_path), before)
    assert len(cached_files(tmp_path)) == 1
    copy.write_text(words(7, 1000))
    assert not torch.equal(cut_test(copy, tokenizer, tmp_path)[0], before[0])


def test_the_cache_follows_the_content_of_a_saved_folder(tokenizer, tmp_path):
    before = cut_test(save_splits(tmp_path / "one", test=words(0, 50)), tokenizer, tmp_path)
    after = cut_test(save_splits(tmp_path / "two", test=words(1, 51)), tokenizer, tmp_path)
    assert not torch.equal(before, after)


def test_cached_tokens_say_what_they_are(text_file, tokenizer, tmp_path):
    from utils.io import read_tensors

    calibrate(text_file, tokenizer, tmp_path)
    _, metadata = read_tensors(cached_files(tmp_path)[0])
    assert metadata["split"] == "calibration"
    assert "RandomWindows" in metadata["recipe"]
    assert "seqlen=8" in metadata["recipe"]


@pytest.mark.parametrize("damage", ["truncate", "garbage", "flip", "other tensor"])
def test_a_damaged_cache_file_is_replaced(damage, text_file, tokenizer, tmp_path, caplog):
    tokens = calibrate(text_file, tokenizer, tmp_path)
    (path,) = cached_files(tmp_path)
    good = path.read_bytes()
    if damage == "other tensor":
        save_file({"weights": torch.zeros(2)}, path)
    else:
        damaged = {"truncate": good[:-5], "garbage": b"x" * 40, "flip": good[:-8] + bytes([good[-8] ^ 1]) + good[-7:]}
        path.write_bytes(damaged[damage])
    assert torch.equal(calibrate(text_file, tokenizer, tmp_path), tokens)
    assert "making the tokens again" in caplog.text
    caplog.clear()
    assert torch.equal(calibrate(text_file, tokenizer, tmp_path), tokens)
    assert not caplog.records


def test_a_cache_folder_that_cannot_be_written_costs_a_warning_only(text_file, tokenizer, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert calibrate(text_file, tokenizer, tmp_path).shape == (4, 8)
    assert "tokens cannot be cached" in caplog.text


# labels and fingerprints


@pytest.mark.parametrize(
    ("dataset", "label"),
    [
        ("wikitext2", "wikitext2"),
        ("mix", "mix"),
        ("c4=/data/c4.parquet", "c4"),
        ("wikitext2=wt2.txt", "wikitext2"),
        ("/data/tiny.stories.txt", "tiny.stories"),
        ("c4-train.00000-of-01024.json.gz", "c4-train.00000-of-01024"),
        ("data/saved/", "saved"),
        ("tokens.safetensors", "tokens"),
        ("runs/a=b/story.txt", "story"),
    ],
)
def test_labels_are_names_or_stems(dataset, label):
    assert data.dataset_label(dataset) == label


def test_a_path_with_an_equals_sign_is_a_path_where_it_exists(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a=b.txt").write_text(words(0, 20))
    assert data.dataset_label("a=b.txt") == "a=b"
    assert cut_test("a=b.txt", tokenizer, tmp_path).shape == (2, 8)


def test_a_folder_keeps_the_dot_in_its_label(tmp_path):
    (tmp_path / "saved.v2").mkdir()
    assert data.dataset_label(str(tmp_path / "saved.v2")) == "saved.v2"


def test_token_files_are_told_from_texts():
    assert data.is_token_file("x/tokens.safetensors")
    assert not data.is_token_file("x/story.txt")
    assert not data.is_token_file("wikitext2")


def test_fingerprints_follow_shape_and_ids_but_not_dtype():
    tokens = torch.arange(12).view(3, 4)
    assert data.data_fingerprint(tokens) == data.data_fingerprint(tokens.to(torch.int32))
    others = [tokens.view(4, 3), tokens + 1, tokens[:2]]
    assert len({data.data_fingerprint(other) for other in [tokens, *others]}) == 4


# without a network


def ask_for_documents(questions, tmp_path, **environment):
    """What `utils.corpora` answers in a fresh process: the text or the error per (dataset, split), and the seconds."""
    script = """
import json, sys, time
from utils.corpora import Split, parse_dataset, read_documents
from utils.errors import InputError
answers, start = [], time.monotonic()
for dataset, split in json.loads(sys.argv[1]):
    try:
        answers.append("|".join(read_documents(parse_dataset(dataset), Split(split))))
    except InputError as error:
        answers.append(f"InputError: {error}")
print(json.dumps([answers, time.monotonic() - start]))
"""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**inherited, "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", script, json.dumps(questions)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


EVERY_CORPUS = [
    (name, split)
    for name in ("wikitext2", "ptb", "c4", "c4-new", "pile")
    for split in ("calibration", "test")
    if (name, split) != ("pile", "test")
]


@pytest.mark.parametrize(
    "environment",
    [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}],  # a port where nothing answers
    ids=["offline mode", "no connection"],
)
def test_a_corpus_that_cannot_be_fetched_names_the_flag_for_a_local_copy_at_once(environment, tmp_path):
    answers, seconds = ask_for_documents(EVERY_CORPUS, tmp_path, **environment)
    flags = {"calibration": "--calib_dataset", "test": "--test_dataset"}
    for (name, split), answer in zip(EVERY_CORPUS, answers, strict=True):
        assert answer.startswith(f"InputError: {name}: cannot be fetched from the hub (")
        assert f"give a local copy with {flags[split]} {name}=PATH" in answer
        assert "\n" not in answer
    assert seconds < 20


def in_hub_cache(hub, repo, revision, name):
    """The path of a file in a cache laid out as the hub's library does."""
    folder = hub / f"datasets--{repo.replace('/', '--')}"
    reference = folder / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text("0" * 40)
    file = folder / "snapshots" / ("0" * 40) / name
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def fill_hub_cache(hub):
    wikitext2 = in_hub_cache(hub, "Salesforce/wikitext", "main", "wikitext-2-raw-v1/train-00000-of-00001.parquet")
    save_parquet(wikitext2, {"text": ["", words(0, 50), words(50, 100)]})
    ptb = in_hub_cache(hub, "ptb-text-only/ptb_text_only", "refs/convert/parquet", "penn_treebank/train/0000.parquet")
    save_parquet(ptb, {"sentence": [words(100, 150), words(150, 200)]})
    c4 = in_hub_cache(hub, "allenai/c4", "main", "en/c4-train.00000-of-01024.json.gz")
    c4.write_bytes(gzip.compress(json.dumps({"text": words(200, 300), "url": "u", "timestamp": "t"}).encode()))


def test_a_corpus_in_the_hubs_cache_needs_no_network(tmp_path):
    fill_hub_cache(tmp_path / "hub" / "hub")
    questions = [(name, "calibration") for name in ("wikitext2", "ptb", "c4", "c4-new")]
    answers, _ = ask_for_documents(questions, tmp_path, HF_HUB_OFFLINE="1")
    c4 = words(200, 300)
    assert answers == ["|" + words(0, 50) + "|" + words(50, 100), words(100, 150) + "|" + words(150, 200), c4, c4]


def test_mix_is_equal_thirds_and_the_remainder_from_the_first(tokenizer, tmp_path, monkeypatch):
    fill_hub_cache(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    tokens = calibrate("mix", tokenizer, tmp_path, nsamples=8)
    assert (tokens[:, 0] // 100).tolist() == [0] * 4 + [1] * 2 + [2] * 2
    assert all(is_contiguous(window) for window in tokens)


# real files, where they are


def shared(*parts):
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"shared/{'/'.join(parts)} is not here")
    return path


def test_the_shared_token_file_brings_its_shapes(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(shared("data", "models", "babyllama_root"))
    tokens = shared("golden", "babyllama_root_tokens.safetensors")
    assert calibrate(tokens, tokenizer, tmp_path, nsamples=None, seqlen=None).shape == (32, 256)
    assert cut_test(tokens, tokenizer, tmp_path, seqlen=None).shape == (60, 256)


def test_the_shared_c4_gives_two_different_tests(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(shared("data", "models", "stories260K"))
    path = shared("data", "text", "c4_validation_2k.parquet")
    c4, c4_new = (cut_test(f"{name}={path}", tokenizer, tmp_path, seqlen=512) for name in ("c4", "c4-new"))
    assert c4.shape == c4_new.shape == (256, 512)
    assert not torch.equal(c4, c4_new)
