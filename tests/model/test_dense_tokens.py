"""Tokens that stay dense: the prompt's, and the first ones, with and without a cache, padded or not."""

import pytest
import torch
from transformers import PreTrainedModel

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.model.sparsifiers import apply_sparsity

IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9]])
MASKS = {
    "shared": [("q", "k", "v"), ("gate", "up")],
    "own": [("q",), ("o",), ("down",)],
    "neuron": [("neuron",)],
}


def dense(name: str) -> PreTrainedModel:
    return (
        families.build(families._opt(activation_function="gelu")) if name == "opt" else families.family(name)
    )


def selecting(kind: str, name: str, **fields) -> PreTrainedModel:
    """Return a model whose every mask drops much."""
    is_plain = name in families.PLAIN_MLP
    sites = [tuple(s for s in group if not (is_plain and s == "gate")) for group in MASKS[kind]]
    sparsifiers = tuple(Sparsifier(group, "topk", k=3, **fields) for group in sites)
    return apply_sparsity(dense(name), ActivationSparsity(sparsifiers))


CASES = [(k, n) for k in MASKS for n in ("llama", "opt", "gpt2") if (k, n) != ("own", "gpt2")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_prompt_is_dense_and_decoding_is_not(kind: str, name: str) -> None:
    model = selecting(kind, name, phase="decode")
    everywhere = selecting(kind, name)
    prompt = dense(name)(IDS, use_cache=True)
    own = model(IDS, use_cache=True)
    assert torch.equal(own.logits, prompt.logits)
    assert not torch.equal(own.logits, everywhere(IDS).logits)
    token = torch.tensor([[8], [30]])
    expected = everywhere(token, past_key_values=prompt.past_key_values).logits
    assert torch.equal(model(token, past_key_values=own.past_key_values).logits, expected)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_first_tokens_are_dense(kind: str, name: str) -> None:
    model, original = selecting(kind, name, dense_first_tokens=3), dense(name)
    full = model(IDS).logits
    assert torch.equal(full[:, :3], original(IDS).logits[:, :3])
    assert not torch.isclose(full[:, 3:], original(IDS).logits[:, 3:], atol=1e-3).all()
    assert torch.equal(selecting(kind, name, dense_first_tokens=5)(IDS).logits, original(IDS).logits)


@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_cache_changes_nothing(kind: str, name: str, split: int) -> None:
    model = selecting(kind, name, dense_first_tokens=3)
    first = model(IDS[:, :split], use_cache=True)
    second = model(IDS[:, split:], past_key_values=first.past_key_values)
    logits = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_generating_is_the_same_with_and_without_a_cache(name: str) -> None:
    model = selecting("shared", name, dense_first_tokens=3)
    texts = [
        model.generate(IDS[:1, :2], max_new_tokens=6, do_sample=False, use_cache=use, pad_token_id=0)
        for use in (True, False)
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_generating_decodes_after_a_dense_prompt(name: str) -> None:
    model, everywhere = selecting("own", name, phase="decode"), selecting("own", name)
    length = 6
    text = model.generate(
        IDS[:1], max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0
    )
    state = dense(name)(IDS[:1], use_cache=True)
    expected = IDS[:1]
    for _ in range(length):
        logits = state.logits[:, -1].clone()
        logits[:, 1] = -torch.inf  # the end of the sequence, which min_new_tokens forbids
        token = logits.argmax(-1, keepdim=True)
        expected = torch.cat([expected, token], 1)
        state = everywhere(token, past_key_values=state.past_key_values)
    assert torch.equal(text, expected)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_padding_on_the_left_is_no_first_token(name: str) -> None:
    model = selecting("own", name, dense_first_tokens=2)
    padded = torch.cat([torch.full((2, 3), 2), IDS], 1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 5)], 1).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_positions_are_counted_from_the_mask_where_none_are_given() -> None:
    model, seen = selecting("own", "llama", dense_first_tokens=2), []
    mask = model.model.layers[0].self_attn.q_proj.sparsifier
    mask.register_forward_hook(lambda _m, _args, output: seen.append((output == 0).any(-1)))
    model(IDS, attention_mask=torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))
    assert seen[0][0].tolist() == [False, False, False, False, True]
    assert seen[0][1].tolist() == [False, False, True, True, True]


def test_embeddings_and_recomputation_see_the_same_tokens() -> None:
    model = selecting("own", "llama", dense_first_tokens=2)
    embeddings = model.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(IDS).logits)
    gradients = []
    for recomputes in (False, True):
        model.zero_grad()
        if recomputes:
            model.train().gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        gradients.append(model.model.layers[0].mlp.down_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_an_input_relu_may_leave_tokens_dense() -> None:
    model = families.family("llama")
    relu = Sparsifier(("q", "k", "v"), "relu", dense_first_tokens=2)
    apply_sparsity(model, ActivationSparsity((Sparsifier(("neuron",), "relu"), relu)))
    seen: list[torch.Tensor] = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model(IDS)
    assert seen[0][:, :2].min() < 0
    assert seen[0][:, 2:].min() == 0


def test_a_part_of_the_model_alone_is_refused() -> None:
    model = selecting("own", "llama", dense_first_tokens=2)
    projection = model.model.layers[0].self_attn.q_proj
    model(IDS)
    with pytest.raises(UserError, match="run the whole model"):
        projection(torch.zeros(1, 7, 24))
