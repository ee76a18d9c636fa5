"""Checks 3 and 4: heads and their keys and values, left out by those who know and by those who don't."""

import pytest
import torch
from patients import llama, patient_of, with_useless_head
from tests.families import family

from relufy.doctor import heads, keys_and_values
from relufy.doctor.head_masks import Heads, num_kept
from relufy.doctor.kv_masks import hidden_keys, honours_masks, written
from relufy.errors import UserError


@pytest.mark.parametrize(("count", "kept"), [(2, 1), (3, 2), (8, 4), (9, 5)])
def test_half_of_the_heads_are_skipped_never_all(count: int, kept: int) -> None:
    assert num_kept(count) == kept


def test_importance_is_the_norm_of_what_a_head_adds() -> None:
    model = llama()
    patient = patient_of(model)
    x = torch.randn(5, 24)
    found = Heads(model.config, patient.blocks).importance(0, x)
    weight = model.model.layers[0].self_attn.o_proj.weight
    for head in range(3):
        part = x[:, 8 * head : 8 * head + 8] @ weight[:, 8 * head : 8 * head + 8].T
        torch.testing.assert_close(found[:, head], part.norm(dim=-1))


def test_a_useless_head_costs_nothing_to_skip_and_its_keys_neither() -> None:
    patient = patient_of(with_useless_head())
    figures = heads.check(patient).figures
    assert figures["oracle"]["nats_more"] == pytest.approx(0.0, abs=1e-5)
    assert figures["random"]["nats_more"] > 0.01
    kv = keys_and_values.check(patient)
    assert kv.status == "good"
    assert kv.figures["cost_of_skipping_kv"]["nats_more"] == pytest.approx(0.0, abs=1e-5)


def test_skipping_keys_is_told_apart_from_skipping_heads() -> None:
    figures = keys_and_values.check(patient_of(llama())).figures
    parts = figures["kv_skipped"]["nats_more"] - figures["kv_written"]["nats_more"]
    assert figures["cost_of_skipping_kv"]["nats_more"] == pytest.approx(parts, abs=1e-9)


def test_a_hidden_key_is_hidden_from_all_later_tokens_and_no_others() -> None:
    """Against transformers' own 4D mask."""
    model = llama()
    patient = patient_of(model)
    ids = torch.from_numpy(patient.test[:2])
    kept = torch.ones(2, ids.shape[1], 3, dtype=torch.bool)
    kept[:, 5] = False
    with torch.inference_mode(), hidden_keys(model, patient.blocks, written({0: kept, 1: kept}, 3)):
        found = model(input_ids=ids, use_cache=False).logits
    length = ids.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[6:, 5] = False
    mask = torch.zeros(2, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        torch.testing.assert_close(found, model(input_ids=ids, attention_mask=mask, use_cache=False).logits)


def test_heads_that_share_keys_skip_them_only_together() -> None:
    kept = torch.tensor([[[True, False, False, False]]]).expand(1, 2, 4)
    seen = written({0: kept}, 2)(0, 1, 2, torch.device("cpu"))
    assert seen[0, :, 1, 0].tolist() == [True, True, False, False]


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "bloom", "gemma2"])
def test_masks_by_head_work_in_many_families(name: str) -> None:
    model = family(name)
    ids = torch.arange(3, 15)[None]
    with torch.inference_mode():
        assert honours_masks(model, patient_of(model).blocks, ids, 3)


def test_one_head_cannot_be_skipped() -> None:
    with pytest.raises(UserError, match="one head"):
        heads.check(patient_of(llama(num_attention_heads=1, num_key_value_heads=1, head_dim=24)))


def test_what_cannot_be_checked_is_named() -> None:
    from tests.families import MORE_FAMILIES, build

    from relufy.doctor.doctor import _run_checks

    found = {
        finding.check: finding for finding in _run_checks(patient_of(build(MORE_FAMILIES["mpt"]())), None)
    }
    assert found["keys_and_values"].status == "unchecked"
    assert "MptForCausalLM" in found["keys_and_values"].verdict
    assert all(finding.status != "unchecked" for name, finding in found.items() if name != "keys_and_values")
