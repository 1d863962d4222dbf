"""Windows that begin with BOS, by every protocol; and what stays as it was without."""

import json
import random

import pytest
import torch
from bos_cases import BOS, WORDS, bos_tokenizer, windows_of, words
from safetensors.torch import save_file

from utils import data
from utils.errors import InputError
from utils.io import read_tensors
from utils.windows import Bos

ALWAYS, AUTO, NEVER = Bos(BOS, begins=True, strict=True), Bos(BOS, begins=True), Bos(BOS)
both_tokenizers = pytest.mark.parametrize("adds", [True, False], ids=["adds BOS", "adds none"])


def calibrate(dataset, folder, adds=True, bos=ALWAYS, nsamples=6, seqlen=8, seed=3):
    how = {"nsamples": nsamples, "seqlen": seqlen, "seed": seed, "cache_dir": folder / "cache", "bos": bos}
    return data.calibration_tokens(str(dataset), bos_tokenizer(adds), **how)


def cut_test(dataset, folder, adds=True, bos=ALWAYS, seqlen=8):
    return data.test_tokens(str(dataset), bos_tokenizer(adds), seqlen=seqlen, cache_dir=folder / "cache", bos=bos)


def follow_each_other(windows):
    """Whether all tokens [N, T] are words, each the one that follows the one before."""
    return bool((windows >= 3).all()) and bool((windows.diff() % WORDS == 1).all())


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(words(80))
    return path


@pytest.fixture
def documents(tmp_path):
    """1200 documents, every fourth of exactly 8 words and the others of 4."""
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": words(8 if n % 4 == 0 else 4)}) + "\n" for n in range(1200)))
    return path


@both_tokenizers
def test_consecutive_test_windows_are_bos_and_all_of_the_text_in_order(adds, text, tmp_path):
    tokens = cut_test(text, tmp_path, adds)
    assert torch.equal(tokens, windows_of(80, 8, begins=True))
    assert torch.equal(tokens[:, 1:].flatten(), torch.arange(77) + 3), "7 words each, and none is lost between two"


@both_tokenizers
@pytest.mark.parametrize("corpus", [None, "wikitext2", "ptb"])
def test_calibration_windows_of_a_stream_are_bos_and_a_piece_of_text(corpus, adds, text, tmp_path):
    tokens = calibrate(text if corpus is None else f"{corpus}={text}", tmp_path, adds, nsamples=10)
    assert tokens.shape == (10, 8)
    assert tokens.dtype == torch.int64
    assert (tokens[:, 0] == BOS).all()
    assert follow_each_other(tokens[:, 1:])
    rng = random.Random(3)
    assert tokens[:, 1].tolist() == [3 + rng.randint(0, 80 - 7 - 1) for _ in range(10)]


@both_tokenizers
def test_windows_within_documents_are_bos_and_words_of_one_document(adds, documents, tmp_path):
    for tokens in (calibrate(f"pile={documents}", tmp_path, adds), cut_test(f"c4={documents}", tmp_path, adds)):
        assert tokens.shape[1] == 8
        assert (tokens[:, 0] == BOS).all()
        assert (tokens[:, 1:] == torch.arange(7) + 3).all(), "of the 8 words that a long document has, the first 7"


def test_c4_new_is_bos_and_consecutive_text(documents, tmp_path):
    tokens = cut_test(f"c4-new={documents}", tmp_path)
    assert tokens.shape == (256, 8)
    assert (tokens[:, 0] == BOS).all()
    assert torch.equal(
        tokens[:, 1:].flatten()[:24], torch.tensor([*range(8), *range(4), *range(4), *range(4), *range(4)]) + 3
    )


def test_bos_that_is_in_the_text_already_is_not_doubled(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("<s> <s> " + words(14))
    assert torch.equal(cut_test(path, tmp_path), windows_of(14, 8, begins=True))


def test_without_windows_are_cut_as_they_come(text, documents, tmp_path):
    assert torch.equal(cut_test(text, tmp_path, bos=NEVER), windows_of(80, 8, begins=False))
    for bos in (None, NEVER):
        tokens = cut_test(text, tmp_path / str(bos), adds=False, bos=bos)
        assert torch.equal(tokens.flatten(), torch.arange(80) + 3)
    assert torch.equal(calibrate(text, tmp_path, bos=NEVER), calibrate(text, tmp_path, bos=None))
    assert (calibrate(f"pile={documents}", tmp_path, bos=NEVER)[:, 0] == BOS).all(), (
        "9 tokens: the first is drawn alone"
    )


def test_a_text_of_one_window_is_enough_and_of_one_word_less_is_not(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(words(7))
    assert cut_test(path, tmp_path).shape == calibrate(path, tmp_path, nsamples=1).shape == (1, 8)
    path.write_text(words(6))
    for call in (cut_test, calibrate):
        with pytest.raises(InputError, match=r"6 tokens.* 7.*--seqlen.*of the 8 tokens of a window the first is BOS"):
            call(path, tmp_path)


def test_windows_with_and_without_have_cache_entries_of_their_own(text, tmp_path):
    made = [cut_test(text, tmp_path, bos=bos) for bos in (ALWAYS, AUTO, NEVER, None)]
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[2], made[3])
    assert not torch.equal(made[0], made[2])
    assert torch.equal(cut_test(text, tmp_path), made[0]), "as it was cached"


def test_entries_cached_before_there_was_the_choice_are_of_windows_without(text, tmp_path):
    cut_test(text, tmp_path, bos=NEVER)
    [path] = (tmp_path / "cache").iterdir()
    _, description = read_tensors(path)
    assert set(description) == {"format", "tokenizer", "dataset", "split", "recipe", "fingerprint"}
    assert description["format"] == "1"
    protocol = r"ConsecutiveWindows(separator='\n\n', first_documents=None)"
    assert description["recipe"] == f"Recipe(protocol={protocol}, nsamples=None, seqlen=8, seed=0)"


def test_windows_of_a_token_file_are_taken_as_they_are_or_refused(tmp_path):
    path = tmp_path / "tokens.safetensors"
    with_bos, without = windows_of(80, 8, begins=True), windows_of(80, 8, begins=False)
    save_file({"test": without.int(), "calibration": with_bos}, path)
    assert torch.equal(cut_test(path, tmp_path, bos=AUTO), without)
    assert torch.equal(calibrate(path, tmp_path, nsamples=None), with_bos)
    with pytest.raises(InputError, match=r"9 rows of tensor 'test' do not begin with BOS \(1\).*--add_bos always"):
        cut_test(path, tmp_path)
    save_file({"calibration": without}, path)
    assert torch.equal(calibrate(path, tmp_path, nsamples=1), without[:1]), "only what is used must begin with it"
