"""Texts that can be read again from their beginning: files on this machine, and data sets on the hub."""

import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from gzip import BadGzipFile
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from relufy.errors import UserError
from relufy.train.encoding import PIECE, Piece, cut, document_pieces
from relufy.train.rows import TEXT_KINDS, file_rows, kind_of, open_bytes, row_text

PACKED_SHRINKS = 3
"""How many bytes of text a byte of .gz or .parquet holds, roughly."""
SHUFFLE_ROWS = 1000
"""Rows of a data set on the hub that are shuffled among each other; its files are shuffled as well."""


@dataclass(frozen=True)
class LocalText:
    """Files, each with the field that its rows' text is in."""

    files: tuple[tuple[Path, str], ...]

    def pieces(self, tokenizer: Any, seed: Sequence[int] | None = None) -> Iterator[Piece]:
        """Yield the files' text in their order, or with a seed in another.

        Text files that follow each other are one text, joined by newlines; each row is a document.
        """
        runs = [(is_text, list(run)) for is_text, run in groupby(self._ordered(seed), _is_text)]
        for is_text, run in runs:
            if is_text:
                yield from ((piece, False) for piece in cut(_text_chunks([path for path, _ in run])))
                if len(runs) > 1:
                    yield "", True
                continue
            for path, field in run:
                for where, row in file_rows(path):
                    yield from document_pieces(row_text(row, field, where, tokenizer))

    def size(self) -> int:
        """Return about how many bytes of text there are."""
        return sum(
            path.stat().st_size * (PACKED_SHRINKS if path.suffix in (".gz", ".parquet") else 1)
            for path, _ in self.files
        )

    def about(self) -> dict[str, Any]:
        """Return what identifies the files without reading them: names, sizes, fields."""
        listed = [[path.name, path.stat().st_size, field] for path, field in self.files]
        digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        return {"files": len(listed), "bytes": sum(size for _, size, _ in listed), "names_and_sizes": digest}

    def __str__(self) -> str:
        names = [str(path) for path, _ in self.files]
        return ", ".join(names) if len(names) < 4 else f"{names[0]} and {len(names) - 1} more files"

    def _ordered(self, seed: Sequence[int] | None) -> list[tuple[Path, str]]:
        if seed is None:
            return list(self.files)
        return [self.files[at] for at in np.random.default_rng(seed).permutation(len(self.files))]


@dataclass(frozen=True)
class HubText:
    """A split of a data set on the hub, at one revision, read as it comes over the network."""

    name: str
    revision: str
    config: str | None
    split: str
    field: str

    def pieces(self, tokenizer: Any, seed: Sequence[int] | None = None) -> Iterator[Piece]:
        """Yield the rows, each a document, in the data set's order, or with a seed in another."""
        rows = _load_dataset(self)
        if seed is not None:
            number = int(np.random.SeedSequence(list(seed)).generate_state(1)[0])
            rows = rows.shuffle(seed=number, buffer_size=SHUFFLE_ROWS)
        for number, row in enumerate(_until_it_fails(rows, self), start=1):
            yield from document_pieces(row_text(row, self.field, f"{self}, row {number}", tokenizer))

    def about(self) -> dict[str, Any]:
        """Return what identifies the data."""
        return {key: getattr(self, key) for key in ("name", "revision", "config", "split", "field")}

    def __str__(self) -> str:
        return ":".join(["hub", self.name, *([self.config] if self.config else []), self.split])


def parse_hub(where: str, field: str) -> HubText:
    """Return what `hub:owner/name[@revision][:config[:split]]` names, pinned to the hub's commit of now.

    The split is "train" unless given. Raises UserError.
    """
    name, config, split, *more = [*where.removeprefix("hub:").split(":"), "", ""]
    name, _, revision = name.partition("@")
    if not name or any(more):
        raise UserError(
            f"expected hub:owner/name, hub:owner/name:config or ...:config:split, found {where!r}"
        )
    return HubText(name, _commit(name, revision or None), config or None, split or "train", field)


def _is_text(file: tuple[Path, str]) -> bool:
    return kind_of(file[0]) in TEXT_KINDS


def _text_chunks(paths: Sequence[Path]) -> Iterator[str]:
    """Yield the files' text in parts, a newline between two files. Raises UserError if it is no UTF-8."""
    for number, path in enumerate(paths):
        if number:
            yield "\n"
        try:
            with io.TextIOWrapper(open_bytes(path), encoding="utf-8", newline="") as stream:
                while part := stream.read(PIECE):
                    yield part
        except (UnicodeDecodeError, BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(
                f"{path} is not UTF-8 text{' in gzip' * (path.suffix == '.gz')}: {error}"
            ) from None
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror or error}") from None


def _commit(name: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:  # the hub's errors, the network's, and those of what lies between
        raise UserError(f"the hub did not give the data set {name}: {_one_line(error)}") from None


def _load_dataset(text: HubText) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            "data sets on the hub need the package datasets: pip install 'relufy[train]'"
        ) from None
    try:
        return load_dataset(text.name, text.config, split=text.split, revision=text.revision, streaming=True)
    except Exception as error:  # datasets raises errors of many kinds, also for a wrong name of a config
        raise UserError(f"{text} can't be opened: {_one_line(error)}") from None


def _until_it_fails(rows: Iterable[Any], text: HubText) -> Iterator[Any]:
    try:
        yield from rows
    except Exception as error:  # the network's and the data's, from many packages
        raise UserError(f"{text} could not be read on: {_one_line(error)}; resume the run") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
