"""Texts to tokens and back: UTF-8 bytes, the words of a closed vocabulary, or a ``tokenizer.json`` of Hugging Face."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mtdiffusion_plugins.files import read_text
from mtdiffusion_registry.errors import UserError, did_you_mean

_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
_STRAY = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of bytes that are not UTF-8
_CLOSING = frozenset(",.;:!?")


class Tokenizer(ABC):
    """What turns a text into tokens, numbered from 0.

    Attributes:
        size: how many tokens there are.
        unit: what errors call its tokens.
    """

    size: int
    unit: str

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Raises:
        UserError: if the text has something that is no token.
        """

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """A text for any tokens; of those of a text, that text up to what the tokenizer does not tell apart."""

    @abstractmethod
    def identity(self) -> bytes:
        """What its numbering follows from: two tokenizers of one identity give the same tokens."""

    def fingerprint(self) -> int:
        """Of :meth:`identity`, as a non-negative int64."""
        return int.from_bytes(hashlib.sha256(self.identity()).digest()[:8], "big") >> 1


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8: any text in any language, and nothing to learn."""

    size = 256
    unit = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, tokens: Sequence[int]) -> str:
        """A byte that is not UTF-8 there becomes a question mark: one byte as well, so the text is no longer."""
        return _STRAY.sub("?", bytes(tokens).decode("utf-8", errors="surrogateescape"))

    def identity(self) -> bytes:
        return b"bytes"


def split_words(text: str) -> list[str]:
    """Words and punctuation marks, in lower case."""
    return _WORD.findall(text.lower())


class WordTokenizer(Tokenizer):
    """The words and marks of a closed vocabulary; upper and lower case are one.

    Raises:
        ValueError: for an entry that is no word, or that is there twice.
    """

    unit = "words"

    def __init__(self, vocabulary: Sequence[str]) -> None:
        for word in vocabulary:
            if split_words(word) != [word]:
                parts = f" ({', '.join(map(repr, split_words(word)))})" if split_words(word) else ""
                raise ValueError(
                    f"vocabulary: expected single words or marks in lower case, found {word!r}{parts}; write its parts"
                )
        if twice := [word for word, count in Counter(vocabulary).items() if count > 1]:
            raise ValueError(f"vocabulary: expected different words, found twice: {', '.join(twice)}")
        self.vocabulary = tuple(vocabulary)
        self.size = len(self.vocabulary)
        self._number = {word: number for number, word in enumerate(self.vocabulary)}

    @classmethod
    def learned(cls, path: Path) -> WordTokenizer:
        """Of all words in a text file, the most frequent first.

        Raises:
            UserError: if it cannot be read, or has no word.
        """
        counts = Counter(split_words(read_text(path)))
        if not counts:
            raise UserError(f"{path}: expected texts to take the vocabulary from, found no word")
        return cls(sorted(counts, key=lambda word: (-counts[word], word)))

    def encode(self, text: str) -> list[int]:
        words = split_words(text)
        for word in words:
            if word not in self._number:
                raise UserError(
                    f"{shortened(text)!r}: the vocabulary of {self.size} words has no "
                    f"{word!r}{did_you_mean(word, self.vocabulary)} (add it to the vocabulary, or use others)"
                )
        return [self._number[word] for word in words]

    def decode(self, tokens: Sequence[int]) -> str:
        words = [self.vocabulary[token] for token in tokens]
        return "".join(word if word in _CLOSING else f" {word}" for word in words).strip()

    def identity(self) -> bytes:
        return "\n".join(("words", *self.vocabulary)).encode()


class FileTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the library ``tokenizers``: BPE, WordPiece or Unigram, without its special tokens.

    Raises:
        UserError: if the library is not installed, or the file is missing or damaged.
    """

    unit = "tokens"

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                'tokenizer = "file" needs the library tokenizers, which is not installed; run: pip install '
                "'mtdiffusion[tokenizers]'"
            ) from None
        content = read_text(path)
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises Exception itself
            raise UserError(
                f"{path}: cannot be read as a tokenizer.json of the library tokenizers ({error}); expected what its "
                "Tokenizer.save wrote"
            ) from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()  # what is too long is to be known
        numbers = self._tokenizer.get_vocab(with_added_tokens=True).values()
        if not numbers:
            raise UserError(f"{path}: expected a tokenizer with a vocabulary, found an empty one")
        self.size = max(numbers) + 1
        self._identity = content.encode()

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens))
        return text.strip()

    def identity(self) -> bytes:
        return self._identity


def shortened(text: str, most: int = 60) -> str:
    """A text as a message shows it."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def edit_distances(first: Iterable[Sequence[int]], second: Iterable[Sequence[int]]) -> list[float]:
    """Levenshtein distances of pairs of sequences over the length of the longer one: in [0, 1], 0 of two empty ones."""
    return [_distance(a, b) / max(len(a), len(b), 1) for a, b in zip(first, second, strict=True)]


def _distance(a: Sequence[int], b: Sequence[int]) -> int:
    if a == b:
        return 0
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]
