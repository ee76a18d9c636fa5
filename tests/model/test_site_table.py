"""The table of sites adds up, for every family, and says what fused projections and missing norms cost."""

from math import prod
from pathlib import Path

import pytest
import torch

import families
import relufy
from relufy.errors import UserError
from relufy.model.site_table import SiteTable, site_table

ALL = families.FAMILIES | families.MORE_FAMILIES


def table_of(name: str, folder: Path, **changes: object) -> SiteTable:
    config = ALL[name]()
    config.update(changes)
    config.save_pretrained(folder)
    return site_table(folder)


@pytest.mark.parametrize("name", ALL)
def test_it_adds_up(name: str, tmp_path: Path) -> None:
    table = table_of(name, tmp_path, dtype="bfloat16")
    assert table.kind == "dense decoder" and table.refusal is None and table.dtype == "bfloat16"
    assert sum(part.share_of_model for part in table.parts) == pytest.approx(1)
    assert sum(row.share_of_blocks for row in table.rows) == pytest.approx(1)
    assert all(row.parameters == row.modules * prod(row.shape) for row in table.rows)
    assert all(row.bytes == 2 * row.parameters for row in table.rows)
    assert sum(row.parameters for row in table.rows) == table.parts[0].parameters
    assert all(part.parameters >= 0 for part in table.parts)
    model = families.build(ALL[name]())
    assert sum(part.parameters for part in table.parts) == sum(w.numel() for w in model.parameters())


def test_a_row_is_a_projection_of_all_blocks(tmp_path: Path) -> None:
    rows = {row.sites: row for row in table_of("gpt2", tmp_path).rows}
    assert list(rows) == [("q", "k", "v"), ("o",), ("up",), ("down",)]
    qkv = rows["q", "k", "v"]
    assert qkv.module == "transformer.h.*.attn.c_attn" and qkv.shape == (72, 24) and qkv.modules == 2
    assert [row.input for row in rows.values()] == [
        "transformer.h.*.ln_1",
        "attention",
        "transformer.h.*.ln_2",
        "neuron",
    ]


def test_a_tied_head_counts_once(tmp_path: Path) -> None:
    tied = {
        part.name: part.parameters for part in table_of("llama", tmp_path, tie_word_embeddings=True).parts
    }
    own = {part.name: part.parameters for part in table_of("llama", tmp_path).parts}
    assert tied["embeddings"] == own["embeddings"] == own["head"] == 53 * 24
    assert tied["head (tied to the embeddings)"] == 0


def test_the_neurons_are_there(tmp_path: Path) -> None:
    (neuron,) = table_of("llama", tmp_path).neurons
    assert (neuron.module, neuron.activation) == ("model.layers.*.mlp.act_fn", "SiLUActivation")
    assert (neuron.width, neuron.blocks) == (43, 2)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama", []),
        ("phi3", ["q k v are one projection", "gate up are one projection"]),
        ("olmo2", ["no norm makes the input of q k v and", "no norm makes the input of gate up and"]),
        ("nemotron", ["the MLP has no gate"]),
        ("modernbert_decoder", ["gate up are one", "no norm makes the input of q k v of layer 0 and"]),
    ],
)
def test_notes_say_what_is_lost(name: str, said: list[str], tmp_path: Path) -> None:
    notes = table_of(name, tmp_path).notes
    assert len(notes) == len(said) and all(map(str.startswith, notes, said))


def test_a_quantised_checkpoint_is_noted(tmp_path: Path) -> None:
    quantised = {"quant_method": "gptq", "bits": 4}
    (note,) = table_of("llama", tmp_path, quantization_config=quantised, dtype="float16").notes
    assert "quantised (gptq)" in note and note.endswith("bytes are those of float16")


def test_it_is_public_and_reads_no_weight(bundled: Path) -> None:
    table = relufy.site_table("bundled")
    assert sum(part.parameters for part in table.parts) == relufy.info(bundled)["parameters"]
    assert table.to_dict()["rows"][0]["sites"] == ("q",)


def test_a_configuration_that_cannot_be_built_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "phlogiston"}')
    with pytest.raises(UserError, match="transformers cannot build the model of"):
        site_table(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", torch.float16])
def test_the_dtype_is_the_checkpoints(dtype: object, tmp_path: Path) -> None:
    expected = str(dtype).removeprefix("torch.")
    assert table_of("llama", tmp_path, dtype=dtype).dtype == expected
    assert table_of("llama", tmp_path / "none").dtype == "float32"
