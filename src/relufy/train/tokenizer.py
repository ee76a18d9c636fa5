"""A tokenizer of our own for models trained from scratch: byte-level BPE, so that any text survives it."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from relufy.errors import UserError
from relufy.train.data import Source, open_text, parse_source

BOS = "<|endoftext|>"
SMALLEST = len(pre_tokenizers.ByteLevel.alphabet()) + 1
"""Every byte, and the special token."""


def train_tokenizer(
    files: Sequence[Path | str | Source], vocab_size: int, bos: str = BOS
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of exactly `vocab_size` tokens, learnt from what `--data` takes.

    `bos` has id 0, opens each text, and also ends one (it is the end-of-sequence token). Weights of sources
    count for nothing here. The text is read in pieces; memory holds its distinct words. Raises UserError,
    also if the text has too few words for so many tokens.
    """
    if vocab_size < SMALLEST:
        raise UserError(
            f"a vocabulary has at least {SMALLEST} tokens, every byte and {bos}; found {vocab_size}"
        )
    if not bos:
        raise UserError("the token that opens each text must not be empty")
    sources = [source if isinstance(source, Source) else parse_source(str(source)) for source in files]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(_pieces(sources), _trainer(vocab_size, bos))
    if tokenizer.get_vocab_size() < vocab_size:
        raise UserError(
            f"the text gives {tokenizer.get_vocab_size()} tokens, fewer than {vocab_size}; ask for so many, "
            "or give more text"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=bos, clean_up_tokenization_spaces=False
    )


def _trainer(vocab_size: int, bos: str) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[bos],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )


def _pieces(sources: Sequence[Source]) -> Iterator[str]:
    texts: Iterable[Iterator[tuple[str, bool]]] = (open_text(source).pieces(None) for source in sources)
    return (piece for piece, _ in chain.from_iterable(texts))
