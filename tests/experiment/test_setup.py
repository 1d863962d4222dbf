"""What the flags say of the beginning of windows."""

import pytest
from bos_cases import BOS, bos_tokenizer
from transformers import PreTrainedTokenizerFast

from experiment.options import AddBos
from experiment.setup import window_bos
from utils.errors import InputError
from utils.windows import Bos


@pytest.mark.parametrize(
    ("add", "needed", "bos"),
    [
        (AddBos.AUTO, True, Bos(BOS, begins=True)),
        (AddBos.AUTO, False, Bos(BOS)),
        (AddBos.NEVER, True, Bos(BOS)),
        (AddBos.NEVER, False, Bos(BOS)),
        (AddBos.ALWAYS, True, Bos(BOS, begins=True, strict=True)),
        (AddBos.ALWAYS, False, Bos(BOS, begins=True, strict=True)),
    ],
)
@pytest.mark.parametrize("adds", [True, False])
def test_windows_begin_with_bos_always_or_where_the_family_needs_it(add, needed, bos, adds):
    assert window_bos(add, needed, bos_tokenizer(adds)) == bos


def test_a_tokenizer_without_bos_is_refused_where_it_is_asked_for_and_told_of_where_it_is_needed(caplog):
    without = PreTrainedTokenizerFast(tokenizer_object=bos_tokenizer(False).backend_tokenizer)
    with pytest.raises(InputError, match="--add_bos always: the model's tokenizer has no BOS"):
        window_bos(AddBos.ALWAYS, False, without)
    for add, needed in ((AddBos.AUTO, False), (AddBos.NEVER, True)):
        assert window_bos(add, needed, without) is None
    assert not caplog.records
    assert window_bos(AddBos.AUTO, True, without) is None
    assert "the tokenizer has none" in caplog.text
