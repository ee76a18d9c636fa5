"""Sites are found by structure and dataflow; the unrecognised is refused with reasons.

What is found in which family is in test_site_coverage.py.
"""

import pytest
import torch
import transformers as hf
from torch import nn

import families
from relufy.errors import UserError
from relufy.model.sites import find_sites
from relufy.model.structure import BlockSites


def norm_names(block: BlockSites) -> tuple[str | None, str | None]:
    norms = (block.attention_norm, block.mlp_norm)
    return tuple(norm and norm.name.removeprefix(f"{block.name}.") for norm in norms)  # type: ignore[return-value]


@pytest.mark.parametrize("name", families.FAMILIES)
def test_shapes_are_those_of_the_real_inputs_and_outputs(name: str) -> None:
    model = families.family(name)
    seen: dict[str, tuple[int, int]] = {}
    projections = [p for block in find_sites(model) for p in block.projections().values()]
    for projection in projections:

        def note(_module: nn.Module, args: tuple, output: torch.Tensor, name: str = projection.name) -> None:
            seen[name] = (output.shape[-1], args[0].shape[-1])

        projection.module.register_forward_hook(note)
    model(torch.tensor([[3, 4, 5]]))
    assert {projection.name: projection.shape for projection in projections} == seen


@pytest.mark.parametrize("name", families.FAMILIES)
def test_sites_are_the_same_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        empty = hf.AutoModelForCausalLM.from_config(families.FAMILIES[name]())
    for block, real in zip(find_sites(empty), find_sites(families.family(name)), strict=True):
        assert norm_names(block) == norm_names(real)
        assert block.activation.name == real.activation.name
        assert {s: p.shape for s, p in block.projections().items()} == {
            s: p.shape for s, p in real.projections().items()
        }


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("llama", ["q", "k", "v", "o", "gate", "up", "down"]),
        ("phi3", ["q k v", "o", "gate up", "down"]),
        ("gpt2", ["q k v", "o", "up", "down"]),
    ],
)
def test_groups_are_the_sites_that_one_projection_serves(name: str, groups: list[str]) -> None:
    assert find_sites(families.family(name))[0].groups() == [tuple(group.split()) for group in groups]


def test_shared_inputs_of_a_parallel_block_are_one() -> None:
    (shared,) = find_sites(families.family("falcon"))[0].shared_inputs()
    assert shared[1] == ("q", "k", "v", "up")
    assert [readers for _, readers in find_sites(families.family("llama"))[0].shared_inputs()] == [
        ("q", "k", "v"),
        ("gate", "up"),
    ]


def test_a_norm_that_also_feeds_the_residual_is_not_taken() -> None:
    config = families.FAMILIES["bloom"]()
    config.apply_residual_connection_post_layernorm = True
    assert norm_names(find_sites(families.build(config))[1]) == (None, None)


def test_a_norm_that_half_of_a_group_reads_is_not_taken() -> None:
    model = families.family("llama")
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_pre_hook(lambda _module, args: (args[0] + 0,))
        layer.mlp.up_proj.register_forward_pre_hook(lambda _module, args: (args[0].clone(),))
    assert norm_names(find_sites(model)[1]) == (None, None)


def test_norms_are_found_by_dataflow_not_by_name() -> None:
    model = families.family("llama")
    for layer in model.model.layers:
        before, after = layer.input_layernorm, layer.post_attention_layernorm
        layer.input_layernorm, layer.post_attention_layernorm = nn.Identity(), nn.Identity()
        layer.self_attn.q_norm_by_another_name, layer.mlp.norm = before, after
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (
                args,
                {**kwargs, "hidden_states": module.q_norm_by_another_name(kwargs["hidden_states"])},
            ),
            with_kwargs=True,
        )
        layer.mlp.register_forward_pre_hook(lambda module, args: (module.norm(args[0]),))
    assert norm_names(find_sites(model)[1]) == ("self_attn.q_norm_by_another_name", "mlp.norm")


def test_finding_leaves_the_model_as_it_was() -> None:
    model = families.family("llama").train()
    model.model.layers[1].mlp.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    find_sites(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_another_shape_is_refused_with_what_was_found() -> None:
    config = hf.BertConfig(**families.PLAIN, is_decoder=True)
    with pytest.raises(UserError, match=r"BertLayer.*looked for one MLP .*intermediate.dense") as refusal:
        find_sites(families.build(config))
    assert "\n" not in str(refusal.value)


def test_an_encoder_decoder_is_refused() -> None:
    sizes = {"vocab_size": 53, "d_model": 24, "d_ff": 40, "num_layers": 2, "num_heads": 3}
    with pytest.raises(UserError, match=r"one list of num_hidden_layers = 2 blocks.*encoder.block \(2\)"):
        find_sites(hf.T5ForConditionalGeneration(hf.T5Config(**sizes)))


def test_a_module_without_a_configuration_is_refused() -> None:
    with pytest.raises(UserError, match="Linear is not a decoder"):
        find_sites(nn.Linear(3, 3))


def test_an_unknown_weight_in_a_block_is_refused_by_name() -> None:
    model = families.family("llama")
    model.model.layers[1].laurel = nn.Linear(24, 24)
    with pytest.raises(UserError, match=r"does not know.*model.layers.1.laurel.weight"):
        find_sites(model)


def test_projections_that_do_not_fit_are_refused() -> None:
    model = families.family("llama")
    model.model.layers[0].mlp.up_proj = nn.Linear(24, 41)
    with pytest.raises(UserError, match=r"up_proj should be \(43, 24\)"):
        find_sites(model)


def test_an_activation_that_is_not_used_is_refused() -> None:
    model = families.family("llama")
    for layer in model.model.layers:
        layer.mlp.forward = lambda x, mlp=layer.mlp: mlp.down_proj(
            torch.tanh(mlp.gate_proj(x)) * mlp.up_proj(x)
        )
    with pytest.raises(UserError, match=r"mlp.act_fn \(SiLU.*does not"):
        find_sites(model)
