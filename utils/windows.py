"""How documents become windows of tokens: the protocols of calibration and test, corpus by corpus.

They are those of the GPTQ line of work, down to the order of random draws, so that figures can be compared.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from utils.errors import Missing

Tokenize = Callable[[str], Tensor]  # text -> token ids [n], int64


@dataclass(frozen=True)
class Bos:
    """The tokenizer's BOS. `begins`: every window that is cut from text begins with it.

    `strict`: windows that a file of tokens brings are refused unless they do too, instead of taken as they are.
    """

    token: int
    begins: bool = False
    strict: bool = False


@dataclass(frozen=True)
class RandomWindows:
    """Windows at random places of all documents joined to one stream."""

    separator: str

    def cut(self, documents: list[str], tokenize: Tokenize, *, nsamples: int, seqlen: int, seed: int) -> Tensor:
        """-> [nsamples, seqlen]. Raises InputError if the stream has fewer than nsamples · seqlen tokens."""
        stream = tokenize(self.separator.join(documents))
        if len(stream) < nsamples * seqlen:
            raise Missing(
                f"{len(stream)} tokens, but --nsamples {nsamples} windows of {seqlen} are {nsamples * seqlen}; "
                "lower --nsamples or --seqlen or give a longer text"
            )
        rng = random.Random(seed)
        return torch.stack([_random_window(stream, seqlen, rng) for _ in range(nsamples)])


@dataclass(frozen=True)
class RandomDocuments:
    """Each window at a random place of a random document that has more tokens than the window."""

    def cut(self, documents: list[str], tokenize: Tokenize, *, nsamples: int, seqlen: int, seed: int) -> Tensor:
        """-> [nsamples, seqlen]. Raises InputError if many draws in a row find no document that is long enough."""
        rng = random.Random(seed)
        too_short: set[int] = set()
        windows = []
        for _ in range(nsamples):
            document = _draw_document(documents, tokenize, seqlen, rng, too_short)
            windows.append(_random_window(document, seqlen, rng))
        return torch.stack(windows)


@dataclass(frozen=True)
class ConsecutiveWindows:
    """The (first) documents joined to one stream and cut without overlap, the rest dropped."""

    separator: str
    first_documents: int | None = None

    def cut(self, documents: list[str], tokenize: Tokenize, *, nsamples: int | None, seqlen: int, seed: int) -> Tensor:
        """-> [windows, seqlen], at most nsamples. Raises InputError if the stream does not fill one window."""
        stream = tokenize(self.separator.join(documents[: self.first_documents]))
        if len(stream) < seqlen:
            raise Missing(
                f"the test text has {len(stream)} tokens, less than one window of {seqlen}; "
                "lower --seqlen or give a longer text"
            )
        count = len(stream) // seqlen
        return stream[: count * seqlen].view(count, seqlen)[:nsamples]


@dataclass(frozen=True)
class BehindBos:
    """The windows of another protocol, one token shorter, each behind BOS: consecutive ones still do not overlap.

    What the tokenizer itself puts before a text is left out, so no window begins with two.
    """

    bos: int
    text: RandomWindows | RandomDocuments | ConsecutiveWindows

    def cut(self, documents: list[str], tokenize: Tokenize, *, nsamples: int | None, seqlen: int, seed: int) -> Tensor:
        """-> [windows, seqlen], the first column BOS. Raises InputError as the protocol of the text."""

        def tokenize_alone(text: str) -> Tensor:
            tokens = tokenize(text)
            return tokens[(tokens != self.bos).cumsum(0) > 0]

        try:
            text = self.text.cut(documents, tokenize_alone, nsamples=nsamples, seqlen=seqlen - 1, seed=seed)
        except Missing as error:
            raise Missing(f"{error} (of the {seqlen} tokens of a window the first is BOS)") from None
        return torch.cat([text.new_full((len(text), 1), self.bos), text], dim=1)


Protocol = RandomWindows | RandomDocuments | ConsecutiveWindows | BehindBos


@dataclass(frozen=True)
class Recipe:
    """All that decides which windows are taken from given documents; its repr goes into cache keys."""

    protocol: Protocol
    nsamples: int | None
    seqlen: int
    seed: int

    def windows(self, documents: list[str], tokenize: Tokenize) -> Tensor:
        """-> [windows, seqlen], int64. Raises InputError if the documents do not suffice."""
        return self.protocol.cut(documents, tokenize, nsamples=self.nsamples, seqlen=self.seqlen, seed=self.seed)

    def beginning_with(self, bos: Bos | None) -> "Recipe":
        """The same for windows that begin with BOS, if they are to."""
        return replace(self, protocol=BehindBos(bos.token, self.protocol)) if bos and bos.begins else self


def calibration_recipe(corpus: str | None, nsamples: int, seqlen: int, seed: int) -> Recipe:
    """How a corpus (None: a plain local text) is sampled for calibration."""
    if corpus in ("c4", "c4-new", "pile"):
        return Recipe(RandomDocuments(), nsamples, seqlen, seed)
    return Recipe(RandomWindows(_separator(corpus)), nsamples, seqlen, seed)


def test_recipe(corpus: str | None, seqlen: int) -> Recipe:
    """How a corpus (None: a plain local text) is cut for testing; the same windows in every run."""
    if corpus == "c4":
        return Recipe(RandomDocuments(), nsamples=256, seqlen=seqlen, seed=20)
    if corpus == "c4-new":
        return Recipe(ConsecutiveWindows(" ", first_documents=1100), nsamples=256, seqlen=seqlen, seed=0)
    return Recipe(ConsecutiveWindows(_separator(corpus)), nsamples=None, seqlen=seqlen, seed=0)


def _separator(corpus: str | None) -> str:
    return " " if corpus == "ptb" else "\n\n"


def _draw_document(
    documents: list[str], tokenize: Tokenize, seqlen: int, rng: random.Random, too_short: set[int]
) -> Tensor:
    """Tokens of a random document of more than seqlen tokens; notes the shorter ones, so none is tokenised twice."""
    # Long documents can be rarer than one in a hundred (c4 at a long seqlen) without being absent.
    draws = 10_000
    for _ in range(draws):
        index = rng.randint(0, len(documents) - 1)
        if index in too_short:
            continue
        tokens = tokenize(documents[index])
        if len(tokens) > seqlen:
            return tokens
        too_short.add(index)
    raise Missing(
        f"documents are too short for windows of {seqlen}: none of {draws} random draws has more tokens; lower --seqlen"
    )


def _random_window(tokens: Tensor, seqlen: int, rng: random.Random) -> Tensor:
    """A window [seqlen] of tokens [n], n >= seqlen."""
    # The last place, n - seqlen, is never drawn in the field's code; so a seed means the same windows here as there.
    start = rng.randint(0, max(len(tokens) - seqlen - 1, 0))
    return tokens[start : start + seqlen]
