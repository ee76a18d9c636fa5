"""Speculative decoding changes speed and nothing else: the text, distributions, what is left behind."""

import threading
from collections import Counter
from itertools import product

import numpy as np
import pytest

import relufy
from relufy.engine.cpu import CpuEngine
from relufy.engine.pack import pack
from relufy.engine.sampling import Sampling
from relufy.engine.speculation import Speculation, as_speculation
from relufy.engine.speculator import Speculator

PROMPT = "It was a dark night, and the wind was in the trees, and the rain was in the trees."
PENALTIES = {
    "repetition_penalty": 1.2,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "logit_bias": {300: 2.0, 13: -1.0},
}


@pytest.fixture(scope="module")
def packed(bundled, sparsified, make_checkpoint, tmp_path_factory):
    """Return a function that packs (once) "dense" or "stage1" of the bundled model, or a tiny random one."""
    folder, made = tmp_path_factory.mktemp("packed"), {}

    def path(name: str, dtype: str = "f32"):
        if (name, dtype) not in made:
            sources = {"dense": lambda: bundled, "stage1": lambda: sparsified(bundled, "stage1")}
            source = sources[name]() if name in sources else make_checkpoint(name.removeprefix("tiny-"))
            purpose = "reuse" if "stage" in name else "exact"
            made[name, dtype] = pack(source, folder / f"{name}-{dtype}.relufy", dtype, purpose)
        return made[name, dtype]

    return path


@pytest.fixture(scope="module")
def engine(packed) -> relufy.Engine:
    return relufy.Engine(packed("stage1"), threads=2)


@pytest.fixture(scope="module")
def draft(packed, engine) -> CpuEngine:
    """A draft that agrees often, and not always."""
    return CpuEngine(packed("dense", "int4"), context=1024, threads_of=engine)


def drafts_of(engine: relufy.Engine, draft: CpuEngine, has_zeros: bool = True) -> dict[str, Speculation]:
    found = {
        "lookup": Speculation("lookup", gamma=5),
        "lookup-1": Speculation("lookup", gamma=3, min_match=1),
        "model": Speculation(draft, gamma=4),
        "careful": Speculation(draft, gamma=6, min_probability=0.3),
        "adaptive": Speculation(draft, gamma=8, adaptive=True),
        "itself": Speculation(engine, gamma=3),
        "self": Speculation("self", gamma=4, window=8),
    }
    return found if has_zeros else {name: s for name, s in found.items() if not s.is_self}


def new_sequence(engine: CpuEngine, prompt: list[int], speculation: Speculation) -> int:
    """Return an empty sequence that keeps what the draft needs, which may be limited from token 1 on."""
    return engine.new_sequence(len(prompt), speculation.keeps, num_open=1)


@pytest.mark.parametrize("gamma", range(1, 9))
@pytest.mark.parametrize("name", ["dense", "stage1"])
def test_greedy_text_is_that_of_plain_decoding(packed, name, gamma):
    engine = relufy.Engine(packed(name), threads=1 + gamma % 3)
    draft = relufy.Engine(packed("dense", "int4"), threads_of=engine)
    plain = engine.generate(PROMPT, max_new_tokens=70).run()
    for proposer in ("lookup", draft, engine, *(["self"] if name == "stage1" else [])):
        found = engine.generate(
            PROMPT, max_new_tokens=70, speculation=Speculation(proposer, gamma=gamma)
        ).run()
        assert found.token_ids == plain.token_ids and found.text == plain.text
        assert found.stats.speculation.accepted > 0


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("recipe", ["tiny-dense", "tiny-stage1", "tiny-stage2"])
def test_every_dtype_and_sparsity(packed, recipe, dtype):
    engine = relufy.Engine(packed(recipe, dtype), threads=2, context=512)
    other = packed(recipe, "int4" if dtype == "f32" else "f32")
    draft = relufy.Engine(other, context=512, threads_of=engine)
    prompt, expected = [0, *range(5, 25)], []
    plain = engine.new_sequence(len(prompt))
    expected = engine.decode(plain, prompt, 60, logprobs=2)
    for speculation in drafts_of(engine, draft, "stage" in recipe).values():
        speculator, sequence = engine.speculator(speculation), new_sequence(engine, prompt, speculation)
        found = speculator.decode(sequence, prompt, 60, 60, logprobs=2)
        assert found == expected
        assert engine.tokens(sequence) == engine.tokens(plain)
        engine.free(sequence)
        speculator.close()
    engine.free(plain)


@pytest.mark.parametrize("options", [{}, PENALTIES, {"logprobs": 3}, PENALTIES | {"logprobs": 1}], ids=str)
def test_penalties_bias_and_logprobs_are_those_of_each_place(engine, draft, options):
    plain = engine.generate(PROMPT, max_new_tokens=90, **options).run()
    for name, speculation in drafts_of(engine, draft).items():
        found = engine.generate(PROMPT, max_new_tokens=90, speculation=speculation, **options).run()
        assert found.token_ids == plain.token_ids, name
        assert found.logprobs == plain.logprobs, name


def test_an_end_inside_a_draft_ends_the_text_there(engine, draft):
    prompt = engine.tokenizer.encode(PROMPT)
    plain = engine.new_sequence(len(prompt))
    whole = [choice.token for choice in engine.decode(plain, prompt, 40)]
    for place, (name, speculation) in product((0, 1, 2, 4, 5, 11), drafts_of(engine, draft).items()):
        stop = whole[place]
        first = whole.index(stop)
        speculator, sequence = engine.speculator(speculation), new_sequence(engine, prompt, speculation)
        found = speculator.decode(sequence, prompt, 40, 40, [stop])
        assert [choice.token for choice in found] == whole[: first + 1], name
        assert engine.tokens(sequence) == [*prompt, *whole[:first]]
        speculator.close()
        engine.free(sequence)
    engine.free(plain)


def test_stop_texts_and_the_stream_are_those_of_plain_decoding(engine, draft):
    whole = engine.generate(PROMPT, max_new_tokens=60).run().text
    stop = whole[40:47]
    for speculation in drafts_of(engine, draft).values():
        generation = engine.generate(PROMPT, max_new_tokens=60, stop=stop, speculation=speculation)
        assert "".join(generation) == generation.text == whole[: whole.find(stop)]
        assert generation.finish_reason == "stop"


@pytest.mark.parametrize("policy", ["refuse", "sliding"])
@pytest.mark.parametrize("room", [0, 1, 2, 7])
def test_a_full_context_is_full_at_the_same_token(packed, room, policy):
    engine = relufy.Engine(packed("stage1"), threads=1, context=64)
    draft = relufy.Engine(packed("dense", "int4"), context=64, threads_of=engine)
    prompt = engine.tokenizer.decode(engine.tokenizer.encode(PROMPT * 3)[: 63 - room])
    options = {"max_new_tokens": 3 if policy == "refuse" and room > 4 else 80, "context_policy": policy}
    plain = engine.generate(prompt, **options).run()
    for proposer in ("lookup", draft, "self"):
        found = engine.generate(prompt, speculation=Speculation(proposer, gamma=6), **options).run()
        assert found.token_ids == plain.token_ids and found.finish_reason == plain.finish_reason
        assert found.stats.num_slides == plain.stats.num_slides
    assert engine.free_positions == 64 and draft.free_positions == 64


def test_what_was_looked_up_gives_the_text_of_plain_sampling(engine):
    for seed in range(5):
        options = {"temperature": 0.8, "top_p": 0.9, "seed": seed, "repetition_penalty": 0.95}
        plain = engine.generate(PROMPT, max_new_tokens=80, **options).run()
        found = engine.generate(
            PROMPT, max_new_tokens=80, speculation=Speculation("lookup", min_match=1), **options
        ).run()
        assert found.token_ids == plain.token_ids
        assert found.stats.speculation.tested > 0


VOCAB, NUM_SAMPLES, LENGTH = 12, 6000, 3
SAMPLINGS = {
    "plain": Sampling(1.0),
    "warm-and-cut": Sampling(1.7, top_k=8, top_p=0.9),
    "min-p-and-penalties": Sampling(1.2, min_p=0.05, repetition_penalty=1.3, frequency_penalty=0.5),
}


@pytest.fixture(scope="module")
def small(make_checkpoint, tmp_path_factory):
    """A model of a few tokens, and another one that drafts for it badly."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 16, "intermediate_size": 48}
    target = make_checkpoint("stage1", **sizes, num_hidden_layers=2)
    other = make_checkpoint("dense", **sizes, num_hidden_layers=1)
    engine = CpuEngine(pack(target, folder / "target.relufy"), threads=1)
    return engine, CpuEngine(pack(other, folder / "draft.relufy"), threads_of=engine)


def distributions(engine: CpuEngine, prompt: list[int], sampling: Sampling) -> dict[tuple, np.ndarray]:
    """Return what the token after the prompt and each beginning of a text is drawn from."""
    found: dict[tuple, np.ndarray] = {}
    for beginning in (b for length in range(LENGTH) for b in product(range(VOCAB), repeat=length)):
        sequence = engine.new_sequence(len(prompt))
        logits = engine.step([(sequence, [*prompt, *beginning])])[0]
        found[beginning] = engine.probabilities(sequence, logits, sampling).astype(np.float64)
        engine.free(sequence)
    return found


def joint(rows: dict[tuple, np.ndarray]) -> np.ndarray:
    """Return the probabilities of all texts of LENGTH tokens, in order."""
    texts = product(range(VOCAB), repeat=LENGTH)
    return np.array([np.prod([rows[text[:i]][text[i]] for i in range(LENGTH)]) for text in texts])


def surprise(counts: np.ndarray, expected: np.ndarray) -> float:
    """Return chi-square of counts as standard deviations above its mean; rare cells count as one."""
    expected = expected / expected.sum() * counts.sum()
    assert counts[expected == 0].sum() == 0
    is_rare = expected < 8
    observed = np.append(counts[~is_rare], counts[is_rare].sum())
    wanted = np.append(expected[~is_rare], max(expected[is_rare].sum(), 1e-9))
    freedom = len(wanted) - 1
    return float((((observed - wanted) ** 2 / wanted).sum() - freedom) / (2 * freedom) ** 0.5)


def counted(texts: list[tuple[int, ...]]) -> np.ndarray:
    counts = Counter(texts)
    return np.array([counts[text] for text in product(range(VOCAB), repeat=LENGTH)], float)


@pytest.mark.parametrize("proposer", ["draft", "careful", "adaptive", "lookup", "self"])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_samples_follow_the_models_distribution(small, name, proposer):
    engine, draft = small
    prompt, base = [0, 3, 5, 3, 7, 3], SAMPLINGS[name]
    speculation = {
        "draft": Speculation(draft, gamma=2),
        "careful": Speculation(draft, gamma=2, min_probability=0.3),
        "adaptive": Speculation(draft, gamma=2, adaptive=True),
        "lookup": Speculation("lookup", gamma=2, min_match=1),
        "self": Speculation("self", gamma=2, window=1),
    }[proposer]
    rows = distributions(engine, prompt, base)
    speculator = Speculator(engine, speculation, None if isinstance(speculation.draft, str) else draft)
    texts, sequence = [], new_sequence(engine, prompt, speculation)
    for seed in range(NUM_SAMPLES):
        sampling = Sampling(**(vars(base) | {"seed": seed}))
        chosen = speculator.decode(sequence, prompt, LENGTH, LENGTH, sampling=sampling)
        texts.append(tuple(choice.token for choice in chosen))
        engine.truncate(sequence, 0)
    stats = speculator.stats()
    assert 0 < stats.accepted < stats.tested
    assert surprise(counted(texts), joint(rows)) < 4
    speculator.close()
    engine.free(sequence)


@pytest.mark.parametrize("mistake", ["swapped", "no residual", "always accepted"])
def test_the_statistic_sees_the_known_mistakes(small, mistake):
    """The same game in numpy, played wrong; played right it passes."""
    engine, draft = small
    prompt, sampling, game = [0, 3, 5, 3, 7, 3], SAMPLINGS["plain"], np.random.default_rng(0)
    p, q = distributions(engine, prompt, sampling), distributions(draft, prompt, sampling)

    def play(past: tuple[int, ...], wrong: str) -> int:
        right, drafted = p[past] / p[past].sum(), q[past] / q[past].sum()
        token = game.choice(VOCAB, p=drafted)
        ratio = right[token] / drafted[token]
        if wrong == "always accepted" or game.random() < (1 / ratio if wrong == "swapped" else ratio):
            return int(token)
        residual = right if wrong == "no residual" else np.maximum(right - drafted, 0)
        return int(game.choice(VOCAB, p=residual / residual.sum()))

    def texts(wrong: str) -> list[tuple[int, ...]]:
        found = []
        for _ in range(NUM_SAMPLES):
            text: tuple[int, ...] = ()
            while len(text) < LENGTH:
                text = (*text, play(text, wrong))
            found.append(text)
        return found

    assert surprise(counted(texts(mistake)), joint(p)) > 10
    assert surprise(counted(texts("nothing")), joint(p)) < 4


def test_a_seed_gives_one_text_whatever_else_runs(engine, draft, monkeypatch):
    options = {"temperature": 0.9, "seed": 11, "top_k": 40, "speculation": Speculation(draft, adaptive=True)}
    expected = engine.generate(PROMPT, max_new_tokens=120, **options).run().token_ids
    found: list[list[int]] = []

    def write(seed: int) -> None:
        other = engine.generate(PROMPT, max_new_tokens=120, **(options | {"seed": seed})).run()
        if seed == 11:
            found.append(other.token_ids)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in (11, 3, 11, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seconds in (1e-9, 10.0):  # in runs of one round, and in one run
        monkeypatch.setattr("relufy.engine.window.RUN_SECONDS", seconds)
        write(11)
    assert found == [expected] * 4
    assert engine.generate(PROMPT, 120, **(options | {"seed": 12})).run().token_ids != expected


def test_logprobs_of_drawn_tokens_are_the_models_own(engine, draft):
    generation = engine.generate(
        PROMPT, max_new_tokens=40, temperature=1.1, seed=2, logprobs=2, speculation=Speculation(draft)
    ).run()
    prompt = engine.tokenizer.encode(PROMPT)
    sequence = engine.new_sequence(len(prompt))
    rows = engine.step([(sequence, prompt + generation.token_ids)], "all")[len(prompt) - 1 : -1]
    logprobs = rows - np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True))
    logprobs -= rows.max(1, keepdims=True)
    for row, told in zip(logprobs, generation.logprobs, strict=True):
        assert told.logprob == pytest.approx(row[told.token], abs=1e-4)
        best = np.argsort(-row, kind="stable")[:2]
        assert [token for token, _ in told.top] == best.tolist()
    engine.free(sequence)


def test_plain_decoding_goes_on_from_where_speculation_left(engine, draft):
    prompt = engine.tokenizer.encode(PROMPT)
    plain = engine.new_sequence(len(prompt))
    sampling = Sampling(0.7, seed=5)
    expected = engine.decode(plain, prompt, 60)
    speculator, sequence = engine.speculator(Speculation(draft, gamma=6)), engine.new_sequence(len(prompt))
    found = speculator.decode(sequence, prompt, 20, 60)
    assert 20 <= len(found) <= 26
    found += engine.decode(sequence, [found[-1].token], 10)
    found += speculator.decode(sequence, [found[-1].token], 60 - len(found), 60 - len(found))
    assert found == expected
    engine.truncate(sequence, len(prompt) + 10)
    fork = engine.fork(sequence)
    drawn = [speculator.decode(each, [expected[10].token], 9, 9, (), sampling) for each in (sequence, fork)]
    assert drawn[0] == drawn[1]
    for each in (plain, sequence, fork):
        engine.free(each)
    speculator.close()


def test_a_refused_call_changes_nothing(engine, draft):
    speculator, sequence = engine.speculator(Speculation(draft)), engine.new_sequence()
    engine.step([(sequence, [2, 3])])
    for bad in ({"tokens": []}, {"tokens": [99999]}, {"sampling": Sampling(logit_bias={99999: 1.0})}):
        with pytest.raises(relufy.UserError):
            speculator.decode(**{"sequence": sequence, "tokens": [4], "count": 3, "most": 3} | bad)
        assert engine.tokens(sequence) == [2, 3]
    with pytest.raises(relufy.UserError, match="most must be"):
        speculator.decode(sequence, [4], 5, 4)
    engine.free(sequence)
    speculator.close()
    with pytest.raises(relufy.UserError, match="over"):
        speculator.decode(sequence, [4], 1, 1)


def test_counts_what_it_did(engine):
    """A draft that is the model itself is always right, and a verification reads what its tokens need."""
    gamma, count = 4, 61
    generation = engine.generate(PROMPT, max_new_tokens=count, speculation=Speculation(engine, gamma)).run()
    stats = generation.stats.speculation
    assert stats.chosen == count - 1 and stats.rounds == 12
    assert stats.drafted == stats.tested == stats.accepted == 48
    assert stats.acceptance == 1 and stats.acceptance_by_place == (1.0,) * gamma
    assert stats.tokens_per_round == gamma + 1 and stats.rounds_by_size == {gamma + 1: 12}
    prompt = engine.tokenizer.encode(PROMPT)
    text = prompt + generation.token_ids[:-1]
    sequence = engine.new_sequence(len(prompt))
    engine.step([(sequence, prompt)], "none")
    before = engine.stats()
    for start in range(len(prompt), len(text), gamma + 1):
        engine.step([(sequence, text[start : start + gamma + 1])], "all")
    after = engine.stats()
    engine.free(sequence)
    union = engine.union_density(before, after, 12)["neuron"]
    assert stats.union_sparsity[gamma + 1] == pytest.approx(1 - np.mean(union))
    assert stats.sparsity == engine.sparsity(before, after)
    assert np.mean(stats.sparsity["neuron"]) > stats.union_sparsity[gamma + 1] > 0.1
    assert stats.verify_weight_bytes == after["weight_bytes"] - before["weight_bytes"]
    assert stats.draft_weight_bytes > stats.verify_weight_bytes and stats.draft_kv_bytes > 0
    per_token = (stats.draft_weight_bytes + stats.verify_weight_bytes) / (count - 1)
    assert generation.stats.weight_bytes_per_token == pytest.approx(per_token)
    assert generation.stats.sparsity == stats.sparsity


def test_an_adaptive_gamma_wastes_less(engine):
    def run(adaptive: bool):
        speculation = Speculation("lookup", gamma=8, min_match=1, adaptive=adaptive)
        options = {"temperature": 1.5, "seed": 1, "speculation": speculation}
        generation = engine.generate(PROMPT, max_new_tokens=120, **options).run()
        return generation.token_ids, generation.stats.speculation.drafted

    (text, adapted), (same, fixed) = run(True), run(False)
    assert text == same and 0 < adapted < 0.7 * fixed


def test_a_model_that_drafts_for_itself_reads_less(engine):
    """Its drafts are limited to neurons that were active lately, and its verifications are not."""
    stats = {}
    for window in (2, 64):
        speculation = Speculation("self", gamma=4, window=window)
        stats[window] = engine.generate(PROMPT, 120, speculation=speculation).run().stats.speculation
        assert stats[window].drafted > 60 and 0.3 < stats[window].acceptance < 1
    drafts = {window: s.draft_weight_bytes / s.drafted for window, s in stats.items()}
    assert drafts[2] < drafts[64] < stats[2].bytes_by_size[5]
    assert stats[2].acceptance < stats[64].acceptance
    assert engine.stats()["limited"] > 0


def test_a_careful_draft_proposes_less_and_is_right_more_often(engine, draft):
    def run(min_probability: float):
        speculation = Speculation(draft, gamma=4, min_probability=min_probability)
        return engine.generate(PROMPT, max_new_tokens=120, speculation=speculation).run().stats.speculation

    careless, careful = run(0.0), run(0.5)
    assert careful.drafted < careless.drafted and careful.acceptance > careless.acceptance
    assert run(1.0).drafted == 0


def test_vocabularies_padded_to_another_size_draft_for_each_other(make_checkpoint, tmp_path):
    small = pack(make_checkpoint("stage1", vocab_size=300), tmp_path / "small.relufy")
    large = pack(make_checkpoint("stage1", vocab_size=320), tmp_path / "large.relufy")
    for target, other in ((small, large), (large, small)):
        engine = relufy.Engine(target, threads=1)
        speculation = Speculation(relufy.Engine(other, threads_of=engine), gamma=3)
        bias = {token: 30.0 for token in range(310, 320)} if target == large else {}
        for options in ({}, {"logit_bias": bias | {5: 1.0}}, {"temperature": 2.0, "logit_bias": bias}):
            plain = engine.generate("ab", max_new_tokens=50, **options).run()
            found = engine.generate("ab", max_new_tokens=50, speculation=speculation, **options).run()
            assert len(found.token_ids) == 50
            if "temperature" not in options:
                assert found.token_ids == plain.token_ids


def test_drafts_that_cannot_draft_are_refused_by_name(engine, packed):
    with pytest.raises(
        relufy.UserError, match=r"tiny-stage1-f32.relufy can't draft for stage1-f32.relufy: .*"
    ):
        engine.generate("a", speculation=str(packed("tiny-stage1")))
    with pytest.raises(relufy.UserError, match=r"the draft dense-int4.relufy has 32 positions"):
        engine.generate("a", speculation=Speculation(CpuEngine(packed("dense", "int4"), context=32)))
    with pytest.raises(relufy.UserError, match="there is no checkpoint folder"):
        engine.generate("a", speculation="nonesuch")
    with pytest.raises(
        relufy.UserError, match=r"neurons of this file can't be reused: no neurons are skipped"
    ):
        relufy.Engine(packed("dense")).generate("a", speculation="self")
    with pytest.raises(relufy.UserError, match="reuse is not exact, and speculation"):
        engine.generate("a", speculation="lookup", reuse=4)
    speculator = engine.speculator(Speculation("self"))
    with pytest.raises(relufy.UserError, match="only a sequence with reuse, of period 1"):
        speculator.decode(engine.new_sequence(), [1], 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draft": ""}, "draft is empty"),
        ({"draft": "lookup", "gamma": 0}, "gamma must be a whole number, at least 1 and at most 127"),
        ({"draft": "lookup", "gamma": 128}, "gamma must be"),
        ({"draft": "lookup", "gamma": 2.0}, "gamma must be"),
        ({"draft": "lookup", "min_match": 0}, "min_match must be"),
        ({"draft": "lookup", "min_probability": 0.5}, "min_probability is for a draft model"),
        ({"draft": "model", "min_probability": 1.5}, "min_probability must be at least 0 and at most 1"),
        ({"draft": "model", "min_match": 2}, "min_match is for the draft lookup"),
        ({"draft": "lookup", "window": 8}, "window is for the draft self"),
        ({"draft": "self", "window": 0}, "window must be"),
    ],
    ids=str,
)
def test_senseless_speculations_are_refused(arguments, message):
    with pytest.raises(relufy.UserError, match=message):
        Speculation(**arguments)


def test_a_speculation_is_a_value_or_a_draft():
    assert as_speculation("lookup") == Speculation("lookup") == as_speculation(Speculation("lookup"))
    with pytest.raises(relufy.UserError, match="speculation must be"):
        as_speculation(3)
