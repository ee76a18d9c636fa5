"""A trained tokenizer loses no text, opens each with its token, and is read by all that read tokenizers."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from relufy.engine.pack import pack
from relufy.engine.packed_file import read_header
from relufy.engine.tokenizer import ModelTokenizer
from relufy.errors import UserError
from relufy.model.checkpoint import load_tokenizer, save_checkpoint
from relufy.train.tokenizer import train_tokenizer

TEXT = "".join(
    f"The {word} of a {word}er, {n} times {word}ing.\n" for n, word in enumerate(["read", "sing"] * 40)
)


def trained(folder: str, vocab_size: int = 300) -> PreTrainedTokenizerFast:
    path = Path(folder) / "text.txt.gz"
    path.write_bytes(gzip.compress(TEXT.encode()))
    return train_tokenizer([path], vocab_size)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return trained(str(tmp_path_factory.mktemp("text")))


def test_it_has_the_size_asked_for_and_its_token_first(tokenizer):
    assert len(tokenizer) == 300 == len(tokenizer.get_vocab())
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    ids = tokenizer("The reader").input_ids
    assert ids[0] == 0 and ids.count(0) == 1 and len(ids) < len("The reader")
    assert tokenizer("The reader", add_special_tokens=False).input_ids == ids[1:]


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_survives(tokenizer, text: str):
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_folder_reader_gives_the_same(tokenizer, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=300, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, **sizes)
    save_checkpoint(LlamaForCausalLM(config), tokenizer, tmp_path / "model")
    loaded = load_tokenizer(tmp_path / "model")
    packed = ModelTokenizer(read_header(pack(tmp_path / "model", tmp_path / "model.relufy")))
    for text in TEXT[:200], " caf\u00e9  \n\n", "<|endoftext|>The end", "":
        assert loaded(text).input_ids == tokenizer(text).input_ids == packed.encode(text)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert loaded.decode(ids) == text
        assert packed.decode(ids) == text.replace("<|endoftext|>", "")
    assert packed.eos_ids == {0} and loaded.bos_token_id == loaded.eos_token_id == 0


def test_rows_and_another_token_will_do(tmp_path):
    rows = [{"body": line} for line in TEXT.splitlines()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer([f"{tmp_path}/rows.jsonl#body"], 280, bos="<s>")
    assert (tokenizer.bos_token, tokenizer.bos_token_id, len(tokenizer)) == ("<s>", 0, 280)


def test_training_is_deterministic(tokenizer, tmp_path):
    assert trained(str(tmp_path)).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_vocabulary_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("aa bb")
    with pytest.raises(UserError, match="at least 257 tokens"):
        train_tokenizer([tmp_path / "text.txt"], 256)
    with pytest.raises(UserError, match=r"the text gives 2\d\d tokens, fewer than 1000"):
        train_tokenizer([tmp_path / "text.txt"], 1000)
    with pytest.raises(UserError, match="there is no text file"):
        train_tokenizer([tmp_path / "missing.txt"], 300)
    with pytest.raises(UserError, match="must not be empty"):
        train_tokenizer([tmp_path / "text.txt"], 300, bos="")
