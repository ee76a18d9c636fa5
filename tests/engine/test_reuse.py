"""Neuron reuse: equal to its specification, exact where it promises, refused where it makes no sense."""

import numpy as np
import pytest
from tests.engine.contract import assert_close, bits, in_steps, relative_error, tokens_of

import relufy
from relufy.activation_sparsity import Sparsifier
from relufy.engine.naive import NaiveDecoder
from relufy.engine.naive_reuse import mix
from relufy.engine.pack import pack
from relufy.engine.reuse import Reuse
from relufy.errors import UserError

NEURON = Sparsifier(("neuron",), "relu", shift=0.8)
DRELU = (Sparsifier(("neuron",), "drelu"), Sparsifier(("down",), "topk", k=30))
STAGE2 = (NEURON, Sparsifier(("gate", "up"), "threshold", threshold=0.3))
MODELS = {"gated": ("llama", (NEURON,)), "plain": ("opt", ()), "drelu": ("llama", DRELU)}
SETTINGS = {
    "window": Reuse(4, window=3),
    "wide window": Reuse(3, window=9),
    "prompt": Reuse(5, "prompt", share=0.3),
    "blocks": Reuse(3, "blocks"),
    "blocks that reset": Reuse(2, "blocks", resets=True),
    "adaptive": Reuse(9, "adaptive", window=4, most_missed=0.4),
    "random": Reuse(4, window=3, is_control=True),
}
LENGTH, PROMPT = 40, 7
TOKENS = tokens_of(513, LENGTH)


def run(engine, reuse, size=1, tokens=TOKENS):
    sequence = engine.new_sequence(PROMPT, reuse)
    parts = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    logits = np.concatenate([engine.step([(sequence, part)], "all") for part in parts])
    engine.free(sequence)
    return logits


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", SETTINGS)
def test_equals_the_specification(case, model, make_checkpoint, tmp_path):
    family, sparsifiers = MODELS[model]
    path = pack(make_checkpoint(family=family, sparsifiers=sparsifiers), tmp_path / "m", for_="reuse")
    expected, went_by = NaiveDecoder(path).run_reusing(TOKENS, SETTINGS[case], PROMPT)
    engine = relufy.Engine(path, threads=1)
    found = run(engine, SETTINGS[case])
    assert relative_error(found, expected.logits) < 1e-4
    stats = engine.stats()
    assert stats["limited"] == went_by.opens.count(False) > 0
    frozen = ~np.array(went_by.opens)
    assert stats["fired"] == [int(went_by.active[layer][frozen].sum()) for layer in range(2)]
    if case != "adaptive":
        assert stats["candidates"] == [int(went_by.sets[layer].sum()) for layer in range(2)]
    exact = in_steps(engine, TOKENS, 1, PROMPT)
    assert relative_error(found[: PROMPT + 1], exact[: PROMPT + 1]) == 0
    assert relative_error(found, exact) > 1e-3
    for threads, size in ((2, 3), (3, LENGTH)):
        assert bits(run(relufy.Engine(path, threads=threads), SETTINGS[case], size)) == bits(found)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8", "int4"])
def test_equals_the_specification_in_every_type(dtype, make_checkpoint, tmp_path):
    folder = make_checkpoint(sparsifiers=STAGE2, num_hidden_layers=1, hidden_size=96)
    path = pack(folder, tmp_path / "m", dtype, for_="reuse")
    expected, _ = NaiveDecoder(path).run_reusing(TOKENS, SETTINGS["window"], PROMPT)
    engine = relufy.Engine(path, threads=2, kv_dtype="f32")
    found = run(engine, SETTINGS["window"], 4)
    assert assert_close(found, expected.logits, expected.margins) > LENGTH // 2


def test_adaptive_opens_when_too_much_is_missed(make_checkpoint, tmp_path):
    path = pack(make_checkpoint(sparsifiers=(NEURON,)), tmp_path / "m")
    naive = NaiveDecoder(path)
    opens = {
        most: naive.run_reusing(TOKENS, Reuse(12, "adaptive", window=2, most_missed=most), PROMPT)[1].opens
        for most in (0.0, 0.5, 1.0)
    }
    counts = {most: sum(found) for most, found in opens.items()}
    assert counts[0.0] > counts[0.5] > counts[1.0] == PROMPT + len(range(PROMPT, LENGTH, 12))


@pytest.mark.parametrize("model", MODELS)
def test_a_period_of_one_and_sets_of_all_are_exact(model, make_checkpoint, tmp_path):
    family, sparsifiers = MODELS[model]
    engine = relufy.Engine(pack(make_checkpoint(family=family, sparsifiers=sparsifiers), tmp_path / "m"))
    exact = bits(in_steps(engine, TOKENS, 1, PROMPT))
    assert engine.sparsity(_zero(engine), engine.stats())
    for policy in ("window", "prompt", "adaptive"):
        assert bits(run(engine, Reuse(1, policy))) == exact
    assert engine.stats()["limited"] == 0
    assert bits(run(engine, Reuse(99, "prompt", share=1.0))) == exact
    assert engine.stats()["limited"] == LENGTH - PROMPT - 1


def _zero(engine):
    stats = engine.stats()
    return {"tokens": 0, "used": {site: [0] * len(counts) for site, counts in stats["used"].items()}}


def test_generations_reuse_and_say_so(make_checkpoint, tmp_path):
    folder = make_checkpoint(sparsifiers=STAGE2)
    engine = relufy.Engine(folder, context=100, reuse=Reuse(4, window=4))
    first = engine.generate("Once upon", 30).run()
    assert engine.generate("Once upon", 30, reuse=Reuse(4, window=4)).run().token_ids == first.token_ids
    stats = first.stats.reuse
    assert stats and (stats.open_tokens, stats.frozen_tokens) == (8, 21)  # the first is the prompt's
    assert 0 < stats.fired_share <= stats.candidate_share < 1
    assert "21 of 29 tokens frozen" in stats.summary()
    exact = engine.generate("Once upon", 30, reuse=1).run()
    assert exact.stats.reuse and exact.stats.reuse.frozen_tokens == 0
    plain = relufy.Engine(folder, context=100).generate("Once upon", 30).run()
    assert plain.token_ids == exact.token_ids != first.token_ids and plain.stats.reuse is None


def test_slides_read_what_they_keep_in_full(make_checkpoint):
    engine = relufy.Engine(make_checkpoint(sparsifiers=(NEURON,)), context=32, reuse=4)
    generation = engine.generate("Once", 60, context_policy="sliding").run()
    assert generation.stats.num_slides > 1 and len(generation.token_ids) == 60


def test_forks_reuse_what_an_exact_sequence_had_active(make_checkpoint, tmp_path):
    path = pack(make_checkpoint(sparsifiers=(NEURON,)), tmp_path / "m")
    engine = relufy.Engine(path)
    exact = engine.new_sequence(PROMPT, Reuse(1, window=6))
    engine.step([(exact, TOKENS[:20])], "none")
    draft = engine.fork(exact, Reuse(1000, window=6))
    rows = engine.step([(draft, TOKENS[20:30])], "all")
    expected, _ = NaiveDecoder(path).run_reusing(TOKENS[:30], Reuse(1000, window=6), PROMPT, 19)
    assert relative_error(rows, expected.logits[20:]) < 1e-4
    with pytest.raises(UserError, match="did not keep"):
        engine.fork(exact, Reuse(policy="blocks"))
    with pytest.raises(UserError, match="only a sequence with reuse"):
        engine.fork(engine.new_sequence(), Reuse())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"period": 0}, "period"),
        ({"window": 1.5}, "window"),
        ({"policy": "windows"}, "did you mean 'window'"),
        ({"share": 1.1}, "share"),
        ({"most_missed": float("nan")}, "most_missed"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        Reuse(**wrong)


def test_models_without_zeros_and_other_layouts_are_refused(make_checkpoint, tmp_path):
    dense = make_checkpoint()
    with pytest.raises(UserError, match="can't be reused: no neurons are skipped"):
        relufy.Engine(dense, reuse=4)
    with pytest.raises(UserError, match="can't be reused: no neurons are skipped"):
        relufy.Engine(dense).generate("Once", 4, reuse=4)
    stage2 = make_checkpoint(sparsifiers=STAGE2)
    engine = relufy.Engine(pack(stage2, tmp_path / "exact"))
    with pytest.raises(UserError, match="pack the model for reuse"):
        engine.generate("Once", 4, reuse=4)
    with pytest.raises(UserError, match="pack the model for reuse"):
        engine.new_sequence(2, Reuse())
    with pytest.raises(UserError, match="no neurons are skipped"):
        relufy.Engine(pack(stage2, tmp_path / "dense", for_="dense"), reuse=2)
    assert relufy.Engine(stage2, reuse=4).header.metadata()["for"] == "reuse"
    top = make_checkpoint(sparsifiers=(Sparsifier(("neuron",), "topk", k=60),))
    with pytest.raises(UserError, match="among all of them"):
        relufy.Engine(top, reuse=4)


def test_the_hash_is_that_of_the_engine():
    # The first outputs of SplitMix64 from seed 0 (Vigna's splitmix64.c).
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4
