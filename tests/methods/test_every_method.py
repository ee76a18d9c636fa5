"""What every calibrated method promises alike: its checkpoint loads natively with the same bits, generates,
compiles, takes adapters or refuses them, and runs on the engine under the contract."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import families
import relufy
from relufy.errors import UserError
from relufy.method import METHODS, Selecting, method_name
from relufy.methods.sparsify import sparsify
from relufy.model.checkpoint import load_model, save_checkpoint
from relufy.model.configuration import sparsity_of
from relufy.recipe import shipped_recipes

torch.set_num_threads(1)

QUICK = {
    "teal": {"step": 0.4},
    "wina": {"step": 0.4},
    "rsparse": {"population": 2, "generations": 1},
    "greedy": {"step": 0.3, "loss_tokens": 512, "loss_increase": 1.01},
    "fatrelu": {"sparsity": 0.8},
}
CALIBRATED = sorted(name for name, cls in METHODS.items() if issubclass(cls, Selecting) and name != "auto")
WITHOUT_ENGINE = {"larosa"}
IDS = torch.tensor([[0, 4, 9, 33, 7, 20, 5, 11, 50, 12]])

MakeSparse = Callable[[str], PreTrainedModel]


def windows_of() -> np.ndarray:
    windows = np.random.default_rng(0).integers(3, 53, (40, 16))
    windows[:, 0] = 0
    return windows


@pytest.fixture(scope="module")
def make_sparse() -> MakeSparse:
    made: dict[str, PreTrainedModel] = {}

    def make(name: str) -> PreTrainedModel:
        if name not in made:
            model = families.family("llama")
            if name == "fatrelu":
                sparsify(model, "relufy-stage1")
            method = METHODS[name](**QUICK.get(name, {}))
            made[name] = sparsify(model, method, windows_of()).eval()
        return copy.deepcopy(made[name])

    return make


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", CALIBRATED)
def test_it_makes_zeros_and_changes_the_output(make_sparse: MakeSparse, name: str) -> None:
    model = make_sparse(name)
    assert sparsity_of(model).recipe["sparsify"]["method"] == name
    assert not torch.equal(logits_of(model), logits_of(families.family("llama")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", CALIBRATED)
def test_it_loads_natively_with_the_same_bits(
    make_sparse: MakeSparse, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make_sparse(name).to(dtype)
    model.save_pretrained(tmp_path / "once")
    once = AutoModelForCausalLM.from_pretrained(tmp_path / "once", dtype=dtype).eval()
    once.save_pretrained(tmp_path / "twice")
    twice = load_model(tmp_path / "twice", dtype)
    assert torch.equal(logits_of(once), logits_of(twice))
    if dtype == torch.float32:
        assert torch.equal(logits_of(once), logits_of(model))


@pytest.mark.parametrize("name", CALIBRATED)
def test_it_generates_alone_and_with_an_assistant(make_sparse: MakeSparse, name: str) -> None:
    model = make_sparse(name)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(IDS[:, :3], **options)
    assert plain.shape == (1, 11)
    assert torch.equal(model.generate(IDS[:, :3], assistant_model=families.family("llama"), **options), plain)


@pytest.mark.parametrize("name", CALIBRATED)
def test_adapters_merge_to_the_same_or_are_refused(make_sparse: MakeSparse, name: str) -> None:
    for targets in (["q_proj", "o_proj", "down_proj"], ["up_proj"]):
        torch.manual_seed(0)
        config = LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
        adapted = get_peft_model(make_sparse(name), config).eval()
        try:
            expected = logits_of(adapted)  # type: ignore[arg-type]
        except UserError as error:
            assert "leave it out of the adapter's target modules" in str(error)
            continue
        merged = adapted.merge_and_unload()
        assert torch.allclose(logits_of(merged), expected, atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CALIBRATED)
def test_it_compiles_into_one_graph(make_sparse: MakeSparse, name: str) -> None:
    model = make_sparse(name)
    expected = logits_of(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(input_ids=IDS, use_cache=False).logits
    torch._dynamo.reset()
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", CALIBRATED)
def test_the_engine_runs_it_or_says_why_not(make_sparse: MakeSparse, name: str, tmp_path: Path) -> None:
    save_checkpoint(make_sparse(name), None, tmp_path / "model")
    if name in WITHOUT_ENGINE:
        with pytest.raises(UserError, match="no fast path"):
            relufy.pack(tmp_path / "model", tmp_path / "packed.relufy")
        return
    engine = relufy.Engine(relufy.pack(tmp_path / "model", tmp_path / "packed.relufy"), threads=1)
    found = engine.step([(engine.new_sequence(), IDS[0].tolist())], "all")
    expected = logits_of(make_sparse(name))[0].numpy()
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error[:4].max() < 1e-4, error


@pytest.mark.parametrize("name", CALIBRATED)
def test_it_has_a_shipped_preset_with_its_defaults(name: str) -> None:
    shipped = shipped_recipes()[name]
    assert method_name(shipped.sparsify) == name
    assert shipped.sparsify == METHODS[name]()
    assert shipped.description


@pytest.mark.parametrize("phase", ["all", "decode"])
def test_phase_and_first_tokens_reach_every_mask(phase: str) -> None:
    method = METHODS["teal"](allocation="uniform", phase=phase, dense_first_tokens=3)
    model = sparsify(families.family("llama"), method, windows_of())
    assert {(s.phase, s.dense_first_tokens) for s in sparsity_of(model).sparsifiers} == {(phase, 3)}
    dense = families.family("llama")
    same = logits_of(model)[:, :3] == logits_of(dense)[:, :3]
    assert bool(same.all())
