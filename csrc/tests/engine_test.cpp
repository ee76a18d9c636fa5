// Whole tiny models: the same bits for a token whatever the threads, the tokens of a step, its neighbours and
// whether zeros are skipped; and requests that can't be served are refused before anything has changed.
#include "engine.h"

#include <unistd.h>

#include <fstream>
#include <thread>

#include "packed_model.h"

namespace {

using Floats = std::vector<float>;
using Ids = std::vector<int32_t>;

constexpr size_t kTokens = 37;  // beyond a KV block, and beyond what goes through the layers together
constexpr size_t kPrompt = 5;

const std::string kPath = "engine_test." + std::to_string(getpid()) + ".relufy";

void save(const TinyModel& model) {
  Bytes bytes = packed(model);
  std::ofstream(kPath, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

Ids some_tokens(size_t count, size_t vocab, uint32_t seed = 1) {
  std::mt19937 random(seed);
  Ids ids(count);
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % vocab);
  return ids;
}

// The logits of all tokens of an item, or of all items.
Floats step(Engine& engine, std::vector<Work> work) {
  Floats logits(Engine::num_logits(work, Logits::all) * engine.decoder().vocab_size);
  engine.step(work, Logits::all, logits.data());
  return logits;
}

// The logits of all tokens of a sequence, `at_once` in each step.
Floats run(Engine& engine, SequenceId id, std::span<const int32_t> tokens, size_t at_once) {
  Floats all;
  for (size_t start = 0; start < tokens.size(); start += at_once) {
    Floats some = step(engine, {{id, tokens.subspan(start, std::min(at_once, tokens.size() - start))}});
    all.insert(all.end(), some.begin(), some.end());
  }
  return all;
}

// The tokens that decode() chooses after `token`.
Ids decoded(Engine& engine, SequenceId id, int32_t token, size_t count, std::span<const int32_t> stops = {},
            const Sampling& sampling = {}) {
  Ids ids;
  for (const Choice& choice : engine.decode(id, {&token, 1}, count, stops, sampling))
    ids.push_back(choice.token);
  return ids;
}

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void test_same_bits(const TinyModel& model) {
  save(model);
  Ids tokens = some_tokens(kTokens, model.vocab);
  Engine first(kPath, {});
  Floats expected = run(first, first.new_sequence(kPrompt), tokens, 1);
  for (float logit : expected) CHECK(std::isfinite(logit));
  for (size_t threads : {1, 2, 3})
    for (bool skip : {true, false}) {
      Engine engine(kPath, {.threads = threads, .context = 256, .skip = skip});
      CHECK(engine.threads() == threads);
      for (size_t at_once : {1, 3, 17, 37}) {
        SequenceId id = engine.new_sequence(kPrompt);
        bool same = same_bits(run(engine, id, tokens, at_once), expected);
        if (!same)
          std::fprintf(stderr, "%s, %s, dtype %u, %zu threads, %zu tokens at once, skip %d\n", engine.isa(),
                       model.name.c_str(), static_cast<unsigned>(model.dtype), threads, at_once, skip);
        CHECK(same || getenv("GO"));
        engine.free(id);
      }
    }
}

// Whether all rows are read, or those of a list, is not in the bits; what was read is in the stats.
void test_crossovers_change_nothing(const TinyModel& model) {
  save(model);
  Ids tokens = some_tokens(kTokens, model.vocab);
  Engine expected(kPath, {});
  Floats logits = run(expected, expected.new_sequence(kPrompt), tokens, 1);
  for (size_t at_once : {1, 5, 37}) {
    uint64_t bytes[2];
    for (float share : {0.0f, 1.0f}) {
      Engine engine(kPath, {.threads = 2, .context = 256});
      for (Product product : {Product::dot, Product::scatter})
        for (size_t size : Crossover::kTokens) engine.set_crossover(product, model.dtype, size, share);
      CHECK(same_bits(run(engine, engine.new_sequence(kPrompt), tokens, at_once), logits));
      bytes[share == 1.0f] = engine.stats().weight_bytes;
    }
    CHECK(bytes[1] <= bytes[0] && (model.name != "bundle" || at_once > 1 || bytes[1] < bytes[0]));
  }
}

void test_refuses_crossovers() {
  Crossover crossover;
  auto refuses = [&](Dtype dtype, size_t tokens, float share) {
    return throws<std::invalid_argument>([&] { crossover.set(Product::dot, dtype, tokens, share); });
  };
  CHECK(refuses(Dtype::f16, 1, 0.5f) && refuses(Dtype::bytes, 1, 0.5f) && refuses(Dtype::f32, 3, 0.5f));
  CHECK(refuses(Dtype::f32, 1, 1.5f) && refuses(Dtype::f32, 1, -1.0f) && refuses(Dtype::f32, 1, NAN));
  crossover.set(Product::dot, Dtype::int4, 4, 0.5f);
  CHECK(crossover.share(Product::dot, Dtype::int4, 7) == 0.5f);
  for (size_t tokens : {3, 8}) CHECK(crossover.share(Product::dot, Dtype::int4, tokens) > 0.5f);
  CHECK(crossover.share(Product::scatter, Dtype::int4, 4) > 0.5f);
}

// A step longer than those before it, and than what goes through the layers together.
void test_long_steps() {
  TinyModel model{.name = "long", .layers = 1, .heads = 2, .context = 400};
  save(model);
  Ids tokens = some_tokens(300, model.vocab);
  Engine a(kPath, {.threads = 2}), b(kPath, {});
  SequenceId id = a.new_sequence();
  Floats found = run(a, id, std::span(tokens).first(3), 3),
         rest = run(a, id, std::span(tokens).subspan(3), 297);
  found.insert(found.end(), rest.begin(), rest.end());
  CHECK(same_bits(found, run(b, b.new_sequence(), tokens, 1)));
}

// Two sequences in a step, at different positions, and a third that forks off.
void test_neighbours_change_nothing(const TinyModel& model) {
  save(model);
  Ids tokens = some_tokens(kTokens, model.vocab), others = some_tokens(kTokens, model.vocab, 2);
  Engine engine(kPath, {.threads = 2, .context = 256, .memory = Memory::load});
  SequenceId alone = engine.new_sequence(kPrompt), a = engine.new_sequence(kPrompt),
             b = engine.new_sequence(2);
  Floats expected = run(engine, alone, tokens, kTokens);
  std::span<const int32_t> mine(tokens), theirs(others);
  Floats head = step(engine, {{b, theirs.first(11)}, {a, mine.first(20)}});
  SequenceId fork = engine.fork(a);
  Floats middle = step(engine, {{a, mine.subspan(20, 3)}, {b, theirs.subspan(11)}, {fork, theirs.first(1)}});
  engine.free(b);
  engine.truncate(fork, 20);
  Floats tail = step(engine, {{fork, mine.subspan(20)}}), rest = step(engine, {{a, mine.subspan(23)}});
  size_t vocab = model.vocab;
  CHECK(std::equal(head.begin() + static_cast<ptrdiff_t>(11 * vocab), head.end(), expected.begin()));
  auto after = [&](size_t n) { return expected.begin() + static_cast<ptrdiff_t>(n * vocab); };
  CHECK(std::equal(after(20), after(23), middle.begin()));
  CHECK(std::equal(after(20), expected.end(), tail.begin()));
  CHECK(std::equal(after(23), expected.end(), rest.begin()));
}

// Back into the prompt and through it again: masks that leave the prompt dense see the same positions.
void test_truncated_into_the_prompt(const TinyModel& model) {
  save(model);
  Ids tokens = some_tokens(kTokens, model.vocab);
  Engine engine(kPath, {});
  SequenceId id = engine.new_sequence(kPrompt);
  Floats expected = run(engine, id, tokens, 7);
  engine.truncate(id, 3);
  Floats again = run(engine, id, std::span(tokens).subspan(3), 5);
  CHECK(std::equal(again.begin(), again.end(), expected.begin() + static_cast<ptrdiff_t>(3 * model.vocab)));
  CHECK(throws<std::invalid_argument>([&] { engine.truncate(id, kTokens + 1); }));
}

// Longer than attention has room for at first.
void test_long_sequence() {
  TinyModel model{.name = "long", .layers = 1, .heads = 2, .context = 1200};
  save(model);
  Ids tokens = some_tokens(1100, model.vocab);
  Engine a(kPath, {.threads = 2}), b(kPath, {});
  CHECK(same_bits(run(a, a.new_sequence(), tokens, 1100), run(b, b.new_sequence(), tokens, 30)));
}

void test_kv_dtypes(const TinyModel& model) {
  save(model);
  Ids tokens = some_tokens(kTokens, model.vocab);
  Engine wide(kPath, {});
  Floats expected = run(wide, wide.new_sequence(), tokens, 5);
  for (Dtype dtype : {Dtype::bf16, Dtype::f16}) {
    Engine engine(kPath, {.threads = 2, .context = 256, .kv_dtype = dtype});
    Floats found = run(engine, engine.new_sequence(), tokens, kTokens);
    CHECK(same_bits(found, run(engine, engine.new_sequence(), tokens, 1)));
    double error = 0, size = 0;
    for (size_t i = 0; i < found.size(); ++i) {
      error += std::pow(found[i] - expected[i], 2);
      size += std::pow(expected[i], 2);
    }
    CHECK(error > 0 && std::sqrt(error / size) < (dtype == Dtype::bf16 ? 0.03 : 0.003));
  }
}

void test_refuses_before_anything_changes() {
  TinyModel model{.name = "small", .context = 40};
  save(model);
  Ids tokens = some_tokens(kTokens, model.vocab);
  Engine engine(kPath, {.threads = 2, .context = 64});
  SequenceId id = engine.new_sequence(), other = engine.new_sequence();
  Engine undisturbed(kPath, {});
  Floats expected = run(undisturbed, undisturbed.new_sequence(), tokens, kTokens);
  run(engine, id, std::span(tokens).first(20), 20);
  auto refuses = [&]<class Error>(std::vector<Work> work, Error*) {
    Floats logits(Engine::num_logits(work, Logits::all) * model.vocab, 7.0f);
    bool refused = throws<Error>([&] { engine.step(work, Logits::all, logits.data()); });
    bool wrote = std::any_of(logits.begin(), logits.end(), [](float x) { return x != 7.0f; });
    return refused && !wrote && engine.length(id) == 20 && engine.length(other) == 0;
  };
  std::invalid_argument* invalid = nullptr;
  OutOfKv* out = nullptr;
  const Ids below{-1}, above{3, static_cast<int32_t>(model.vocab)}, lowest{INT32_MIN}, none, one{1},
      many(41, 1), some(21, 1), block(33, 1);
  for (const Ids* bad : {&below, &above, &lowest, &none}) {
    CHECK(refuses({{id, *bad}}, invalid));
    CHECK(refuses({{other, one}, {id, *bad}}, invalid));
  }
  CHECK(refuses({{id, one}, {id, one}}, invalid));
  CHECK(refuses({{id, one}, {12345, one}}, invalid));
  CHECK(refuses({{other, many}}, out));              // beyond the model's context
  CHECK(refuses({{id, some}}, out));                 // with what the sequence has
  CHECK(refuses({{id, one}, {other, block}}, out));  // one block is left, and two are needed
  CHECK(throws<OutOfKv>([&] { decoded(engine, id, 1, 21); }));
  CHECK(throws<OutOfKv>([&] { decoded(engine, id, 1, SIZE_MAX); }));
  CHECK(throws<OutOfKv>([&] { decoded(engine, id, 1, SIZE_MAX / 8); }));
  CHECK(throws<std::invalid_argument>([&] { decoded(engine, id, 41, 1); }));
  CHECK(throws<std::invalid_argument>([&] { decoded(engine, 12345, 1, 1); }));
  CHECK(throws<std::invalid_argument>([&] { engine.decode(id, {}, 1, {}); }));
  CHECK(throws<std::invalid_argument>([&] { decoded(engine, id, 1, 1, {}, {.logit_bias = {{41, 1.0f}}}); }));
  CHECK(engine.length(id) == 20);
  engine.step({}, Logits::all, nullptr);  // no work at all
  Floats rest = step(engine, {{id, std::span(tokens).subspan(20)}});
  CHECK(std::equal(rest.begin(), rest.end(), expected.begin() + static_cast<ptrdiff_t>(20 * model.vocab)));
}

// decode() against steps and a choice of the greatest.
void test_decode(const TinyModel& model) {
  save(model);
  Engine engine(kPath, {.threads = 2, .context = 256});
  SequenceId id = engine.new_sequence(1), stepped = engine.new_sequence(1);
  Ids expected;
  for (int32_t token = 3; expected.size() < 12; expected.push_back(token)) {
    Floats logits = run(engine, stepped, {&token, 1}, 1);
    token = static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }
  CHECK(decoded(engine, id, 3, 12) == expected);
  CHECK(engine.length(id) == 12);
  engine.truncate(id, 0);
  Ids stops{expected[4], -5, INT32_MAX};
  Ids stopped = decoded(engine, id, 3, 12, stops);
  auto end = std::find(expected.begin(), expected.end(), expected[4]) + 1;
  CHECK(stopped == Ids(expected.begin(), end));
  CHECK(engine.length(id) == stopped.size());
  CHECK(decoded(engine, id, expected[stopped.size() - 1], 12 - stopped.size()) == Ids(end, expected.end()));
  CHECK(decoded(engine, id, 3, 0).empty() && engine.length(id) == 12);

  Engine small(kPath, {.context = 2 * kKvBlock});  // a stop gives back what was reserved
  CHECK(decoded(small, small.new_sequence(1), 3, 2 * kKvBlock, {&expected[0], 1}).size() == 1);
  CHECK(decoded(small, small.new_sequence(), 3, kKvBlock).size() == kKvBlock);
}

// What is taken from another sequence's blocks, which may be gone, gives the bits of a prefill.
void test_reused_prefix(const TinyModel& model) {
  save(model);
  Ids tokens = some_tokens(70, model.vocab), other = tokens;
  other[40] = (other[40] + 1) % static_cast<int32_t>(model.vocab);
  Engine engine(kPath, {.threads = 2, .context = 256}), fresh(kPath, {});
  for (size_t prompt_length : {70, 36, 0})
    for (const Ids* ids : {&tokens, &other, &tokens}) {
      SequenceId id = engine.new_sequence(prompt_length), expected = fresh.new_sequence(prompt_length);
      size_t reused = engine.reuse_prefix(id, *ids);
      CHECK(engine.length(id) == reused && reused % kKvBlock == 0);
      Floats found = run(engine, id, std::span(*ids).subspan(reused), 7);
      Floats whole = run(fresh, expected, *ids, 70);
      CHECK(std::equal(found.begin(), found.end(),
                       whole.begin() + static_cast<ptrdiff_t>(reused * model.vocab)));
      fresh.free(expected);
      engine.free(id);
    }
  CHECK(engine.stats().reused > 0 && engine.free_positions() == 256);
}

// A model without masks for one phase shares blocks whatever the prompt's length; one with them does not.
void test_phases_are_told_apart() {
  TinyModel model{.name = "phases"};
  Ids tokens = some_tokens(65, model.vocab);
  auto reused_after = [&](size_t first, size_t second) {
    save(model);
    Engine engine(kPath, {.context = 256});
    run(engine, engine.new_sequence(first), tokens, 65);
    return engine.reuse_prefix(engine.new_sequence(second), tokens);
  };
  CHECK(reused_after(65, 3) == 64);
  model.masks = {{"down", {.decode_only = true}}};
  CHECK(reused_after(65, 64) == 64 && reused_after(65, 100) == 64);
  CHECK(reused_after(65, 63) == 32 && reused_after(33, 32) == 32);
  CHECK(reused_after(65, 31) == 0 && reused_after(0, 1) == 0 && reused_after(0, 0) == 64);
}

// Sampled tokens are the same alone, in turns with others, after a rollback and in a fork.
void test_sampling_is_the_sequences_own(const TinyModel& model) {
  save(model);
  Sampling sampling{.temperature = 1.5, .top_k = 20, .presence_penalty = 0.5, .seed = 7};
  Engine alone(kPath, {}), engine(kPath, {.threads = 3, .context = 512});
  Ids expected = decoded(alone, alone.new_sequence(1), 3, 40, {}, sampling);
  SequenceId a = engine.new_sequence(1), b = engine.new_sequence(1);
  Ids mine{3}, theirs{3};
  for (size_t at = 0; at < 40; at += 5) {
    Ids some = decoded(engine, a, mine.back(), 5, {}, sampling);
    mine.insert(mine.end(), some.begin(), some.end());
    theirs.push_back(decoded(engine, b, theirs.back(), 1, {}, {.temperature = 9.0, .seed = at}).front());
  }
  CHECK(std::equal(mine.begin() + 1, mine.end(), expected.begin(), expected.end()));
  engine.truncate(a, 11);
  SequenceId fork = engine.fork(a);
  Ids tail(expected.begin() + 11, expected.end());
  CHECK(decoded(engine, a, expected[10], 29, {}, sampling) == tail);
  CHECK(decoded(engine, fork, expected[10], 29, {}, sampling) == tail);

  engine.truncate(fork, 0);  // all at once, as they are verified
  Ids past{3};
  past.insert(past.end(), expected.begin(), expected.end() - 1);
  Floats logits = run(engine, fork, past, 40);
  auto chosen = [&](size_t length) {
    return engine.choose(fork, &logits[(length - 1) * model.vocab], sampling, 0, length).token;
  };
  for (size_t length = 1; length <= 40; ++length) CHECK(chosen(length) == expected[length - 1]);
  CHECK(engine.choose(fork, &logits[39 * model.vocab], sampling).token == expected[39]);
  CHECK(throws<std::invalid_argument>([&] { engine.choose(fork, logits.data(), sampling, 0, 41); }));
}

// Callers in threads of their own, each with its sequences, over blocks that come and go.
void test_many_callers() {
  TinyModel model{.name = "callers"};
  save(model);
  Ids prompt = some_tokens(50, model.vocab);
  Engine alone(kPath, {}), engine(kPath, {.threads = 2, .context = 320});
  std::array<Ids, 4> expected, found;
  auto request = [&](Engine& e, size_t i) {
    SequenceId id = e.new_sequence(prompt.size());
    size_t reused = e.reuse_prefix(id, prompt);
    Sampling sampling{.temperature = 1.0, .seed = i};
    Ids ids;
    for (const Choice& c : e.decode(id, std::span(prompt).subspan(reused), 15, {}, sampling))
      ids.push_back(c.token);
    e.free(id);
    return ids;
  };
  for (size_t i = 0; i < 4; ++i) expected[i] = request(alone, i);
  std::vector<std::thread> callers;
  for (size_t i = 0; i < 4; ++i)
    callers.emplace_back([&, i] {
      for (int turn = 0; turn < 5; ++turn) found[i] = request(engine, i);
    });
  for (std::thread& caller : callers) caller.join();
  CHECK(found == expected && engine.stats().reused > 0);
}

void test_counts_and_options() {
  save({.name = "small"});
  Engine engine(kPath, {.threads = 2, .memory = Memory::load});
  SequenceId id = engine.new_sequence();
  run(engine, id, Ids{1, 2, 3}, 2);
  Stats stats = engine.stats();
  CHECK(stats.tokens == 3 && stats.weight_bytes > 0 && stats.kv_bytes > 0 &&
        stats.used[kQ][1].by_token == 3 * 20);
  Use neurons = stats.used[kNeuron][0];
  CHECK(neurons.by_token > 0 && neurons.by_token < 3 * 70);
  CHECK(neurons.together > 0 && neurons.together <= neurons.by_token);
  engine.reset_stats();
  CHECK(engine.stats().tokens == 0 && engine.stats().weight_bytes == 0);
  CHECK(throws<std::invalid_argument>([&] { engine.free(99); }));
  CHECK(throws<std::invalid_argument>([&] { engine.fork(99); }));
  engine.free(id);
  CHECK(throws<std::invalid_argument>([&] { engine.length(id); }));
  CHECK(Engine(kPath, {.threads = 0}).threads() == 1);
}

}  // namespace

int main() {
  for_each_isa([] {
    for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::int8, Dtype::int4})
      for (const TinyModel& model : tiny_models(dtype)) test_same_bits(model);
  });
  for (Dtype dtype : {Dtype::f32, Dtype::int4})
    for (const TinyModel& model : tiny_models(dtype)) {
      test_neighbours_change_nothing(model);
      test_crossovers_change_nothing(model);
      test_truncated_into_the_prompt(model);
      test_decode(model);
      test_reused_prefix(model);
      test_sampling_is_the_sequences_own(model);
    }
  test_phases_are_told_apart();
  test_many_callers();
  test_kv_dtypes(tiny_models(Dtype::f32).front());
  test_long_sequence();
  test_long_steps();
  test_refuses_crossovers();
  test_refuses_before_anything_changes();
  test_counts_and_options();
  std::remove(kPath.c_str());
}
