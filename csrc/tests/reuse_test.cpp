// Neuron reuse: a period of one is exact; a token's bits depend on its sequence's past alone, whatever the
// steps, threads, neighbours and detours; sets are what earlier tokens had active.
#include "reuse.h"

#include <unistd.h>

#include <fstream>

#include "engine.h"
#include "packed_model.h"

namespace {

using Floats = std::vector<float>;
using Ids = std::vector<int32_t>;
using Policy = ReuseSettings::Policy;

constexpr size_t kTokens = 61, kPrompt = 17;

const std::string kPath = "reuse_test." + std::to_string(getpid()) + ".relufy";

void save(const TinyModel& model) {
  Bytes bytes = packed(model);
  std::ofstream(kPath, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

Ids some_tokens(size_t count, size_t vocab, uint32_t seed = 3) {
  std::mt19937 random(seed);
  Ids ids(count);
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % vocab);
  return ids;
}

std::vector<ReuseSettings> some_settings() {
  return {{.policy = Policy::window, .period = 4, .window = 3},
          {.policy = Policy::window, .period = 3, .window = 100},
          {.policy = Policy::prompt, .period = 5, .share = 0.4},
          {.policy = Policy::blocks, .period = 4},
          {.policy = Policy::blocks, .period = 3, .resets = true},
          {.policy = Policy::adaptive, .period = 8, .window = 5, .most_missed = 0.3},
          {.policy = Policy::window, .period = 6, .window = 4, .is_control = true}};
}

class Model {
 public:
  explicit Model(const TinyModel& model, size_t threads = 1)
      : engine(kPath, {threads, 1024}), model_(model) {}

  SequenceId make(const ReuseSettings& settings, size_t prompt = kPrompt) {
    Reuse::Shape shape{model_.layers, model_.neurons};
    return engine.new_sequence(prompt, std::make_unique<Reuse>(shape, settings, prompt));
  }

  Floats run(SequenceId id, std::span<const int32_t> tokens, size_t at_once = 1) {
    Floats all(tokens.size() * model_.vocab);
    for (size_t start = 0; start < tokens.size(); start += at_once) {
      Work work{id, tokens.subspan(start, std::min(at_once, tokens.size() - start))};
      engine.step({&work, 1}, Logits::all, &all[start * model_.vocab]);
    }
    return all;
  }

  const Reuse& reuse(SequenceId id) { return dynamic_cast<const Reuse&>(*engine.policy(id)); }

  Engine engine;

 private:
  const TinyModel& model_;
};

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

Floats tail(const Floats& rows, size_t first, size_t vocab) {
  return {rows.begin() + static_cast<ptrdiff_t>(first * vocab), rows.end()};
}

void test_period_of_one_is_exact(const TinyModel& model) {
  Ids tokens = some_tokens(kTokens, model.vocab);
  Model m(model, 2);
  Floats exact = m.run(m.engine.new_sequence(kPrompt), tokens);
  for (Policy policy : {Policy::window, Policy::prompt, Policy::adaptive}) {
    CHECK(same_bits(m.run(m.make({.policy = policy, .period = 1}), tokens, 5), exact));
    CHECK(m.engine.stats().limited == 0);
  }
  Floats frozen = m.run(m.make({.policy = Policy::prompt, .period = 9, .share = 1.0}), tokens, 7);
  CHECK(m.engine.stats().limited > 0 && same_bits(frozen, exact));
}

void test_same_bits(const TinyModel& model, const ReuseSettings& settings) {
  Ids tokens = some_tokens(kTokens, model.vocab);
  Model first(model);
  Floats exact = first.run(first.engine.new_sequence(kPrompt), tokens);
  Floats expected = first.run(first.make(settings), tokens);
  bool is_large = settings.window > kTokens || (settings.policy == Policy::blocks && !settings.resets);
  CHECK(is_large || !same_bits(expected, exact));  // a set of a whole prompt may hold all neurons
  size_t open = (kPrompt + 1) * model.vocab;
  CHECK(std::memcmp(expected.data(), exact.data(), open * sizeof(float)) == 0);
  for (size_t threads : {1, 2, 3})
    for (size_t at_once : {1, 2, 5, 61}) {
      Model m(model, threads);
      CHECK(same_bits(m.run(m.make(settings), tokens, at_once), expected));
    }
}

// Generate, go back, generate something else, go back, generate again: as without the detour.
void test_rolls_back(const TinyModel& model, const ReuseSettings& settings) {
  Ids tokens = some_tokens(kTokens, model.vocab), others = some_tokens(kTokens, model.vocab, 99);
  Model m(model);
  Floats expected = m.run(m.make(settings), tokens);
  for (size_t back : {kPrompt, kPrompt + 1, kPrompt + 6, kPrompt + 13, kTokens - 2}) {
    SequenceId id = m.make(settings);
    m.run(id, std::span(tokens).first(kTokens - 2), 7);
    m.engine.truncate(id, back);
    m.run(id, std::span(others).first(9), 2);
    SequenceId child = m.engine.fork(id);
    m.engine.truncate(child, back);
    m.engine.truncate(id, 0);
    m.engine.free(id);
    Floats again = m.run(child, std::span(tokens).subspan(m.engine.length(child)), 3);
    CHECK(same_bits(again, tail(expected, kTokens - again.size() / model.vocab, model.vocab)));
    m.engine.free(child);
  }
}

void test_forks_go_their_own_ways(const TinyModel& model, const ReuseSettings& settings) {
  Ids tokens = some_tokens(kTokens, model.vocab), others = tokens;
  for (size_t i = 30; i < kTokens; ++i) others[i] = (others[i] + 1) % static_cast<int32_t>(model.vocab);
  Model m(model, 2);
  Floats expected[] = {m.run(m.make(settings), tokens), m.run(m.make(settings), others)};
  SequenceId a = m.make(settings);
  m.run(a, std::span(tokens).first(30), 30);
  SequenceId b = m.engine.fork(a), exact = m.engine.new_sequence(kPrompt);
  m.run(exact, std::span(tokens).first(30), 30);
  size_t vocab = model.vocab;
  Floats rows(3 * vocab);
  for (size_t t = 30; t < kTokens; ++t) {
    Work work[] = {{a, {&tokens[t], 1}}, {exact, {&tokens[t], 1}}, {b, {&others[t], 1}}};
    m.engine.step(work, Logits::all, rows.data());
    CHECK(std::memcmp(&rows[0], &expected[0][t * vocab], vocab * sizeof(float)) == 0);
    CHECK(std::memcmp(&rows[2 * vocab], &expected[1][t * vocab], vocab * sizeof(float)) == 0);
  }
}

void test_which_are_open(const TinyModel& model) {
  Model m(model);
  Ids tokens = some_tokens(kTokens, model.vocab);
  auto opens = [&](const ReuseSettings& settings, size_t prompt) {
    SequenceId id = m.make(settings, prompt);
    m.run(id, std::span(tokens).first(prompt + 10), 4);
    std::string text;
    for (size_t i = 0; i < prompt + 10; ++i) text += m.reuse(id).is_open(i) ? 'o' : '.';
    m.engine.free(id);
    return text;
  };
  CHECK(opens({.period = 4}, 3) == "oooo...o...o.");
  CHECK(opens({.period = 4}, 0) == "o...o...o.");
  CHECK(opens({.policy = Policy::prompt, .period = 100}, 3) == "oooo.........");
  CHECK(opens({.policy = Policy::blocks, .period = 2}, 2) == "oooo..oo..oo");
  CHECK(opens({.policy = Policy::adaptive, .period = 4, .most_missed = 1.0}, 3) == "oooo...o...o.");
  std::string strict = opens({.policy = Policy::adaptive, .period = 100, .window = 1, .most_missed = 0.0}, 3);
  CHECK(strict.find('o', 4) != std::string::npos);
}

// The prefix that others computed is taken over only as far as the set needs nothing of it.
void test_prefix_of_the_cache(const TinyModel& model) {
  Ids tokens = some_tokens(kTokens, model.vocab);
  ReuseSettings settings{.period = 4, .window = 5};
  Model m(model);
  size_t prompt = 48;
  Floats expected = m.run(m.make(settings, prompt), tokens);
  auto reused = [&](const ReuseSettings& own) {
    SequenceId id = m.make(own, prompt);
    size_t count = m.engine.reuse_prefix(id, tokens);
    Floats rows = m.run(id, std::span(tokens).subspan(count), 3);
    if (own.window == settings.window && own.policy == settings.policy)
      CHECK(same_bits(rows, tail(expected, count, model.vocab)));
    m.engine.free(id);
    return count;
  };
  CHECK(reused(settings) == kKvBlock);
  CHECK(reused({.period = 4, .window = 18}) == 0);
  CHECK(reused({.policy = Policy::blocks}) == 0 && reused({.policy = Policy::prompt}) == 0);
  m.run(m.make({.period = 4}, 0), tokens);  // frozen ones from its second token on
  SequenceId exact = m.engine.new_sequence(prompt);
  CHECK(m.engine.reuse_prefix(exact, tokens) == kKvBlock);
}

// An exact sequence that keeps its active neurons can be forked to one that reuses them at once.
void test_forks_to_other_settings(const TinyModel& model) {
  Ids tokens = some_tokens(kTokens, model.vocab);
  Model m(model);
  auto fork = [&](SequenceId id, const ReuseSettings& settings) {
    return m.engine.fork(id, [&](const ActiveSetPolicy* own, size_t length) {
      return dynamic_cast<const Reuse&>(*own).with(settings, length);
    });
  };
  SequenceId exact = m.make({.period = 1, .window = 8});
  Floats rows = m.run(exact, tokens, 6);
  m.engine.truncate(exact, 40);
  ReuseSettings draft{.period = 1000, .window = 8};
  Floats drafted = m.run(fork(exact, draft), std::span(tokens).subspan(40));
  CHECK(!same_bits(drafted, tail(rows, 40, model.vocab)));
  CHECK(same_bits(drafted, m.run(fork(exact, draft), std::span(tokens).subspan(40), 4)));
  CHECK(same_bits(m.run(exact, std::span(tokens).subspan(40)), tail(rows, 40, model.vocab)));
  CHECK(throws<std::invalid_argument>([&] { fork(exact, {.policy = Policy::blocks}); }));
  CHECK(throws<std::invalid_argument>([&] { fork(exact, {.policy = Policy::prompt}); }));
}

void test_refusals(const TinyModel& model) {
  Model m(model);
  for (const ReuseSettings& settings :
       {ReuseSettings{.period = 0}, ReuseSettings{.window = 0}, ReuseSettings{.share = 1.5},
        ReuseSettings{.most_missed = -1.0}, ReuseSettings{.share = NAN}})
    CHECK(throws<std::invalid_argument>([&] { m.make(settings); }));
  CHECK(throws<std::invalid_argument>([&] { m.make({.policy = Policy::prompt}, 0); }));

  Ids tokens = some_tokens(kTokens, model.vocab);
  ReuseSettings settings{.policy = Policy::prompt, .share = 0.4};
  SequenceId id = m.make(settings);
  Floats expected = m.run(id, tokens, 5);
  CHECK(throws<std::invalid_argument>([&] { m.engine.truncate(id, kPrompt - 1); }));
  CHECK(m.engine.length(id) == kTokens);
  m.engine.truncate(id, 0);
  CHECK(same_bits(m.run(id, tokens, 4), expected));
}

// Logits that are no numbers: then the sequence, its policy too, is as before, in the middle of a prompt.
void test_failed_decode(const TinyModel& model, const ReuseSettings& settings) {
  Ids tokens = some_tokens(kTokens, model.vocab);
  Model m(model);
  Floats expected = m.run(m.make(settings), tokens);
  SequenceId id = m.make(settings);
  m.run(id, std::span(tokens).first(5));
  Sampling wrong;
  wrong.logit_bias = {{0, NAN}};
  bool failed = throws<std::invalid_argument>(
      [&] { m.engine.decode(id, std::span(tokens).subspan(5, 3), 4, {}, wrong); });
  CHECK(failed && m.engine.length(id) == 5);
  CHECK(same_bits(m.run(id, std::span(tokens).subspan(5), 6), tail(expected, 5, model.vocab)));
}

}  // namespace

int main() {
  for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::int8, Dtype::int4})
    for (const TinyModel& model : tiny_models(dtype)) {
      save(model);
      if (!Engine(kPath, {}).refuses_candidates().empty()) continue;
      bool is_brief = dtype == Dtype::bf16 || dtype == Dtype::int4;
      test_period_of_one_is_exact(model);
      for (const ReuseSettings& settings : some_settings()) test_same_bits(model, settings);
      for (const ReuseSettings& settings : some_settings()) {
        if (is_brief) break;
        test_rolls_back(model, settings);
        test_forks_go_their_own_ways(model, settings);
      }
    }
  TinyModel bundle{.name = "bundle"};
  save(bundle);
  test_which_are_open(bundle);
  test_prefix_of_the_cache(bundle);
  test_forks_to_other_settings(bundle);
  test_refusals(bundle);
  for (const ReuseSettings& settings : some_settings()) test_failed_decode(bundle, settings);
  std::remove(kPath.c_str());
}
