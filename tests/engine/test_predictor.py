"""The mode "predicted": equal to its specification, exact where it promises, refused where it is no use."""

import numpy as np
import pytest
import torch
from tests.engine.contract import assert_close, bits, in_steps, relative_error, tokens_of

import relufy
from relufy.activation_sparsity import Sparsifier
from relufy.engine.naive import NaiveDecoder
from relufy.engine.pack import pack
from relufy.errors import UserError
from relufy.method import Relufication
from relufy.methods.predictor import PredictorOptions, add_predictor, split_text
from relufy.methods.sparsify import sparsify
from relufy.model.checkpoint import load_model, load_tokenizer, save_checkpoint
from relufy.model.configuration import sparsity_of
from relufy.model.predicting import predicting
from relufy.model.predictor import predictable_layers
from relufy.model.sites import find_sites

NEURON = Sparsifier(("neuron",), "relu", shift=0.3)
MASKED = (NEURON, Sparsifier(("gate", "up"), "threshold", threshold=0.3))
CENTRED = (
    NEURON,
    Sparsifier(("gate",), "threshold", threshold=0.2, per_channel=("centre",)),
    Sparsifier(("up",), "threshold", threshold=0.2),
)
MODELS = {
    "gated": ("llama", (NEURON,)),
    "plain": ("opt", ()),
    "masked input": ("llama", MASKED),
    "centred input": ("llama", CENTRED),
    "cats": ("llama", (Sparsifier(("neuron",), "threshold", threshold=0.1),)),
    "one wide layer": ("llama", MASKED, {"hidden_size": 96, "num_hidden_layers": 1}),
    "one layer": ("llama", (Sparsifier(("neuron",), "threshold", threshold=0.1, layers=(1,)),)),
}
LENGTH, PROMPT = 40, 7
TOKENS = tokens_of(513, LENGTH)


@pytest.fixture(scope="module")
def make_predicted(make_checkpoint, tmp_path_factory):
    """Return a function that makes (once) a checkpoint with a predictor; `offset` moves its thresholds."""
    made = {}

    def make(model="gated", rank=9, recall=0.8, offset=0.0):
        key = (model, rank, recall, offset)
        if key not in made:
            family, sparsifiers, *sizes = MODELS[model]
            folder = make_checkpoint(family=family, sparsifiers=sparsifiers, **(sizes[0] if sizes else {}))
            loaded = load_model(folder)
            text = split_text(np.random.default_rng(1).integers(2, 513, (12, 24)))
            add_predictor(loaded, text, PredictorOptions(rank=rank, recall=recall))
            for layer in predictable_layers(find_sites(loaded), sparsity_of(loaded)):
                layer.predictor().threshold.add_(offset)
            made[key] = save_checkpoint(loaded, None, tmp_path_factory.mktemp("predicted") / "model")
        return made[key]

    return make


def run(engine, size=1, num_open=PROMPT, tokens=TOKENS):
    sequence = engine.new_predicted_sequence(PROMPT, num_open)
    parts = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    logits = np.concatenate([engine.step([(sequence, part)], "all") for part in parts])
    engine.free(sequence)
    return logits


@pytest.mark.parametrize("model", [name for name in MODELS if name != "one wide layer"])
def test_equals_the_specification(model, make_predicted, tmp_path):
    path = pack(make_predicted(model), tmp_path / "m", for_="predictor")
    expected, went_by = NaiveDecoder(path).run_predicted(TOKENS, PROMPT)
    engine = relufy.Engine(path, threads=1)
    found = run(engine)
    assert assert_close(found, expected.logits, expected.margins) == LENGTH
    stats = engine.stats()
    assert stats["limited"] == LENGTH - PROMPT
    candidates = [int(went_by.candidates[i].sum()) if i in went_by.candidates else 0 for i in range(2)]
    assert stats["candidates"] == candidates and sum(candidates) > 0
    assert stats["fired"] == [int(went_by.active[i].sum()) if i in went_by.active else 0 for i in range(2)]
    exact = in_steps(engine, TOKENS, 1, PROMPT)
    assert bits(found[:PROMPT]) == bits(exact[:PROMPT])
    assert relative_error(found, exact) > 1e-4
    for threads, size in ((2, 3), (3, LENGTH)):
        assert bits(run(relufy.Engine(path, threads=threads), size)) == bits(found)
    assert bits(run(relufy.Engine(path, skip=False), 5)) == bits(found)


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("model", ["one wide layer", "plain"])
def test_equals_the_specification_in_every_type(model, dtype, make_predicted, tmp_path):
    path = pack(make_predicted(model), tmp_path / "m", dtype, for_="predictor")
    expected, _ = NaiveDecoder(path).run_predicted(TOKENS, PROMPT)
    engine = relufy.Engine(path, threads=2, kv_dtype="f32")
    found = run(engine, 4)
    assert assert_close(found, expected.logits, expected.margins) > LENGTH // 3
    assert bits(run(engine, 1)) == bits(found)


@pytest.mark.parametrize("model", ["gated", "plain"])
def test_equals_the_emulation(model, make_predicted, tmp_path):
    folder = make_predicted(model)
    loaded = load_model(folder)
    with torch.inference_mode(), predicting(loaded):
        expected = loaded(input_ids=torch.tensor([TOKENS])).logits[0].numpy()
    path = pack(folder, tmp_path / "m", for_="predictor")
    margins = NaiveDecoder(path).run_predicted(TOKENS, num_open=0)[0].margins
    assert assert_close(run(relufy.Engine(path), 4, num_open=0), expected, margins, 1e-6) == LENGTH


@pytest.mark.parametrize("model", ["gated", "plain", "masked input"])
@pytest.mark.parametrize(
    "predictor",
    [{"offset": -1e30}, {"rank": 66, "recall": 1.0, "offset": -1e-3}],
    ids=["all candidates", "full rank"],
)
def test_without_a_missed_neuron_it_is_exact(predictor, model, make_predicted, tmp_path):
    """At the gate's rank, scores are the pre-activations; thresholds a little below the cut miss nothing."""
    if model != "plain" and "rank" in predictor:
        predictor = predictor | {"rank": 68}
    path = pack(make_predicted(model, **predictor), tmp_path / "m", for_="predictor")
    engine = relufy.Engine(path, threads=2)
    found = run(engine, 1)
    stats = engine.stats()
    exact = in_steps(engine, TOKENS, 1, PROMPT)
    assert bits(found) == bits(exact)
    assert stats["limited"] == LENGTH - PROMPT
    share = sum(stats["candidates"]) / (stats["limited"] * 172 * 2)
    assert share == 1 if "rank" not in predictor else share < 0.9
    assert bits(run(engine, LENGTH)) == bits(exact)


def test_neighbours_change_nothing(make_predicted, tmp_path):
    """Exact and predicted sequences share steps; each gets what it has alone."""
    engine = relufy.Engine(pack(make_predicted(), tmp_path / "m", "int8", for_="predictor"), context=512)
    texts = [tokens_of(513, 30, seed) for seed in range(5)]
    makers = [engine.new_sequence, engine.new_predicted_sequence]

    def decode(chosen):
        sequences = {i: makers[i % 2](3) for i in chosen}
        rows = {i: [] for i in chosen}
        for start in range(0, 30, 3):
            work = [(sequences[i], texts[i][start : start + 3]) for i in chosen]
            for i, part in zip(chosen, engine.step(work, "all").reshape(len(chosen), 3, -1), strict=True):
                rows[i].append(part)
        for sequence in sequences.values():
            engine.free(sequence)
        return {i: bits(np.concatenate(parts)) for i, parts in rows.items()}

    together = decode(range(5))
    assert together == {i: found for i in range(5) for found in decode([i]).values()}


def test_it_has_no_state(make_predicted, tmp_path):
    """Forked, truncated and written on, a sequence gives what a fresh one gives."""
    engine = relufy.Engine(pack(make_predicted(), tmp_path / "m", for_="predictor"), context=512)
    sequence = engine.new_predicted_sequence(PROMPT)
    engine.step([(sequence, TOKENS[:20])], "none")
    other = engine.fork(sequence)
    wrong = engine.step([(other, TOKENS[30:40])], "all")
    engine.truncate(other, 12)
    assert len(wrong) == 10
    found = np.concatenate(
        [engine.step([(other, TOKENS[12:20])], "all"), engine.step([(sequence, TOKENS[20:])], "all")]
    )
    assert bits(found) == bits(run(engine)[12:])


def test_prefixes_are_shared_while_they_are_exact(make_predicted, tmp_path):
    engine = relufy.Engine(pack(make_predicted(), tmp_path / "m", for_="predictor"))
    text = tokens_of(513, 80)
    first = engine.new_predicted_sequence(70)
    alone = engine.step([(first, text)], "all")
    second = engine.new_predicted_sequence(0)
    assert engine.reuse_prefix(second, text) == 0
    third = engine.new_predicted_sequence(70)
    done = engine.reuse_prefix(third, text)
    assert done == 64
    assert bits(engine.step([(third, text[done:])], "all")) == bits(alone[done:])


def test_refusals(make_checkpoint, make_predicted, tmp_path):
    with pytest.raises(UserError, match="the model has no predictor"):
        pack(make_checkpoint(sparsifiers=(NEURON,)), tmp_path / "none", for_="predictor")
    engine = relufy.Engine(pack(make_predicted(), tmp_path / "exact"))
    with pytest.raises(UserError, match=r"can't be predicted: it has no predictor.*pack the model"):
        engine.check_predictor()
    with pytest.raises(UserError, match="no predictor"):
        engine.new_predicted_sequence()
    relufy.Engine(pack(make_predicted(), tmp_path / "with", for_="predictor")).check_predictor()


def test_bytes_are_those_of_candidates_and_predictor(make_predicted, tmp_path):
    """A predicted token reads the two factors and candidates' rows in place of the gate."""
    engine = relufy.Engine(pack(make_predicted(), tmp_path / "m", for_="predictor"), threads=1)
    sequence = engine.new_predicted_sequence(0)
    engine.step([(sequence, TOKENS[:1])], "none")
    engine.reset_stats()
    engine.step([(sequence, TOKENS[1:2])], "none")
    predicted = engine.stats()
    row, reduced = 320, 64  # f32: 68 weights, and 9, in chunks of 64 bytes
    factors = 2 * (9 * row + 172 * reduced)
    gates = sum(candidates * (row + 4) for candidates in predicted["candidates"])
    exact = engine.new_sequence(0)
    engine.step([(exact, TOKENS[:1])], "none")
    engine.reset_stats()
    engine.step([(exact, TOKENS[1:2])], "none")
    whole = engine.stats()
    listed = [sum(found["used"]["neuron"]) - sum(found["used"]["down"]) for found in (predicted, whole)]
    assert listed == [0, 0]
    neurons = sum(whole["used"]["neuron"]) - sum(predicted["used"]["neuron"])
    saved = 2 * 172 * row + neurons * 2 * (row + 4) - factors - gates
    assert whole["weight_bytes"] - predicted["weight_bytes"] == saved


def test_generation_says_what_was_predicted(predicted_bundled):
    """The prompt is exact, so its first choice is; the stats name the candidates of what follows."""
    engine = relufy.Engine(predicted_bundled, predictor=True)
    generation = engine.generate("It was a dark night", max_new_tokens=12).run()
    stats = generation.stats.prediction
    assert (stats.exact_tokens, stats.predicted_tokens) == (0, 11)
    assert 0 < stats.fired_share < stats.candidate_share < 1
    assert "not exact" in stats.summary()
    exact = relufy.Engine(predicted_bundled).generate("It was a dark night", max_new_tokens=12).run()
    assert exact.stats.prediction is None and exact.token_ids[0] == generation.token_ids[0]


def test_refused_requests(predicted_bundled):
    engine = relufy.Engine(predicted_bundled)
    with pytest.raises(UserError, match="can't be predicted: it has no predictor"):
        engine.generate("Once", predictor=True)
    predicting_engine = relufy.Engine(predicted_bundled, predictor=True)
    with pytest.raises(UserError, match="a predictor and speculation decide on the same neurons"):
        predicting_engine.generate("Once", predictor=True, speculation="lookup")
    with pytest.raises(UserError, match="a predictor and reuse"):
        predicting_engine.generate("Once", reuse=4)


@pytest.fixture(scope="module")
def predicted_bundled(tmp_path_factory):
    model = load_model("bundled")
    sparsify(model, Relufication(stage=1))
    text = np.random.default_rng(1).integers(2, model.config.vocab_size, (6, 32))
    add_predictor(model, split_text(text), PredictorOptions(rank=16, recall=0.9))
    return save_checkpoint(model, load_tokenizer("bundled"), tmp_path_factory.mktemp("bundled") / "model")
