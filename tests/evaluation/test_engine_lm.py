"""In lm-evaluation-harness the engine says what the Hugging Face model says, request by request."""

from typing import Any

import pytest

import relufy

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from tests.evaluation.local_tasks import SENTENCES

from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.evaluation.engine_lm import EngineLM
from relufy.evaluation.hf_lm import HfLM
from relufy.model.sparsifiers import apply_sparsity

LONG = " ".join(SENTENCES) * 20
"""More than the bundled model's 512 positions."""
PAIRS = [
    ("", " The captain"),
    ("", "<|endoftext|>The captain"),
    ("<|endoftext|>It was a dark", " night"),
    ("It was a dark ", "night, and the wind"),
    *[("It was a dark night, and the wind", choice) for choice in (" was", " blew", " had fallen asleep")],
    (LONG, " and then he went"),
    (LONG, " and"),
    ("A", LONG[:1500]),
]
TEXTS = ["", "The captain stood upon the deck.", "<|endoftext|>He said", LONG]


@pytest.fixture(scope="module")
def sparse(bundled, tmp_path_factory) -> Any:
    """Return a checkpoint with thresholds at the inputs and ReLU at the neurons."""
    neuron = Sparsifier(("neuron",), "relu")
    inputs = Sparsifier(("q", "k", "v"), "threshold", threshold=0.4)
    model = apply_sparsity(relufy.load_model(bundled), ActivationSparsity((neuron, inputs)))
    folder = tmp_path_factory.mktemp("models") / "sparse"
    return relufy.save_checkpoint(model, relufy.load_tokenizer(bundled), folder)


@pytest.fixture(scope="module", params=["bundled", "sparse"])
def folder(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def hf(folder: Any, batch_size: int = 4) -> HfLM:
    return HfLM(relufy.load_model(folder), relufy.load_tokenizer(folder), batch_size)


def engine(folder: Any, batch_size: int = 4) -> EngineLM:
    return EngineLM(relufy.Engine(folder, threads=1, context=512 * (batch_size + 1)), batch_size)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]  # type: ignore[arg-type]


def generating(**settings: Any) -> list[Instance]:
    wanted = {"until": [".", " the"], "max_gen_toks": 24} | settings
    texts = [sentence[: len(sentence) // 2] for sentence in SENTENCES]
    return requests("generate_until", [(text, dict(wanted)) for text in [*texts, LONG]])


def test_loglikelihoods_are_the_hugging_face_models(folder) -> None:
    asked = requests("loglikelihood", PAIRS)
    ours, theirs = engine(folder), hf(folder)
    found, expected = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert ours.cuts == theirs.cuts
    assert ours.cuts.cut == 2 and "2 of 10 requests were longer than the 512" in ours.cuts.note()


def test_rolling_loglikelihoods_are_the_hugging_face_models(folder) -> None:
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    ours, theirs = engine(folder), hf(folder)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(theirs.loglikelihood_rolling(asked), rel=1e-4)
    assert ours.cuts.cut == theirs.cuts.cut == 0


def test_texts_are_the_hugging_face_models(folder) -> None:
    ours, theirs = engine(folder), hf(folder)
    found = ours.generate_until(generating())
    assert found == theirs.generate_until(generating())
    assert len(set(found)) > 3 and not any("." in text for text in found)
    assert ours.cuts == theirs.cuts and ours.cuts.cut == 1


@pytest.mark.parametrize("batch_size", [1, 3, 17])
def test_the_batch_size_changes_no_bit(bundled, batch_size: int) -> None:
    asked = requests("loglikelihood", PAIRS)
    assert engine(bundled, batch_size).loglikelihood(asked) == engine(bundled).loglikelihood(asked)


def test_the_models_masks_are_active_in_the_harness(bundled, sparse) -> None:
    asked = requests("loglikelihood", PAIRS[:4])
    dense, masked = hf(bundled).loglikelihood(asked), hf(sparse).loglikelihood(asked)
    assert all(abs(a - b) > 1e-3 for (a, _), (b, _) in zip(dense, masked, strict=True))


def test_sampling_depends_on_the_request_alone(bundled) -> None:
    settings = {"do_sample": True, "temperature": 0.9, "top_p": 0.9}
    found = engine(bundled).generate_until(generating(**settings))
    assert engine(bundled).generate_until(generating(**settings)) == found
    assert found != engine(bundled).generate_until(generating())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_beams": 4}, "num_beams in generating, which the engine has not"),
        ({"do_sample": True, "temperature": 0.0}, "sampling without a temperature"),
        ({"max_gen_toks": 512}, "512 new tokens, and the model has 512 positions"),
    ],
    ids=["beams", "no temperature", "too many"],
)
def test_refuses_what_it_does_not_do(bundled, settings: dict, said: str) -> None:
    with pytest.raises(relufy.UserError, match=said):
        engine(bundled).generate_until(generating(**settings))


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
def test_other_tokenizers_begin_and_split_texts_alike(kit, name: str, tmp_path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = relufy.load_tokenizer(kit / "tokenizers" / name)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 96}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 128}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **layers, **special))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    folder = relufy.save_checkpoint(model.eval(), tokenizer, tmp_path / "model")
    ours, theirs = EngineLM(relufy.Engine(folder, threads=1, context=640)), hf(folder)
    assert (ours.prefix_token_id, ours.eot_token_id) == (theirs.prefix_token_id, theirs.eot_token_id)
    asked = requests("loglikelihood", [*PAIRS[2:7], ("H\u00e9llo \U0001f600 ", "na\u00efve"), (LONG, " and")])
    found, expected = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-4)
    rolling = requests("loglikelihood_rolling", [(text,) for text in ("<s>He said", LONG[:900])])
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(
        theirs.loglikelihood_rolling(rolling), rel=1e-4
    )
    texts = generating(max_gen_toks=6)
    assert ours.generate_until(texts) == theirs.generate_until(texts)
