// Tokens that compute candidate neurons only: with all of them, the bits of the exact mode; with some, a
// token's bits depend on its own candidates alone.
#include "active_set.h"

#include <unistd.h>

#include <bit>
#include <fstream>
#include <set>

#include "engine.h"
#include "mix.h"
#include "packed_model.h"

namespace {

using Floats = std::vector<float>;
using Ids = std::vector<int32_t>;

constexpr size_t kTokens = 37, kPrompt = 5;

const std::string kPath = "active_set_test." + std::to_string(getpid()) + ".relufy";

void save(const TinyModel& model) {
  Bytes bytes = packed(model);
  std::ofstream(kPath, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

Ids some_tokens(size_t count, size_t vocab) {
  std::mt19937 random(7);
  Ids ids(count);
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % vocab);
  return ids;
}

// About a share of the neurons from position `first` on, drawn anew for each token and layer; all before.
class Drawn : public ActiveSetPolicy {
 public:
  Drawn(const TinyModel& model, double share, size_t first = 0, uint64_t seed = 0)
      : words_(set_words(model.neurons)), layers_(model.layers), first_(first) {
    sets_.resize(kTokens * layers_ * words_);
    active_.resize(sets_.size());
    for (size_t i = 0; i < kTokens * layers_; ++i)
      for (size_t j = 0; j < model.neurons; ++j)
        if (static_cast<double>(mix(mix(seed + i) + j) >> 11) * 0x1p-53 < share)
          sets_[i * words_ + j / 64] |= uint64_t{1} << (j % 64);
  }

  std::unique_ptr<ActiveSetPolicy> fork() const override { return std::make_unique<Drawn>(*this); }
  void truncate(size_t length) override { length_ = length; }
  size_t num_exact() const override { return first_; }
  void reserve(size_t, size_t) override {}
  size_t together(size_t, size_t count) const override { return count; }
  void begin(size_t first, size_t) override { CHECK(first == length_); }
  void end(size_t first, size_t count) override { length_ = first + count; }
  const uint64_t* candidates(size_t layer, size_t position) const override {
    return position < first_ ? nullptr : &sets_[at(layer, position)];
  }
  uint64_t* active(size_t layer, size_t position) override { return &active_[at(layer, position)]; }

  // Of the active neurons, those within and outside of the candidates.
  std::pair<size_t, size_t> count() const {
    size_t within = 0, outside = 0;
    for (size_t i = first_ * layers_ * words_; i < sets_.size(); ++i) {
      within += static_cast<size_t>(std::popcount(active_[i] & sets_[i]));
      outside += static_cast<size_t>(std::popcount(active_[i] & ~sets_[i]));
    }
    return {within, outside};
  }

 private:
  size_t at(size_t layer, size_t position) const { return (position * layers_ + layer) * words_; }

  size_t words_, layers_, first_, length_ = 0;
  std::vector<uint64_t> sets_, active_;
};

Floats run(Engine& engine, SequenceId id, std::span<const int32_t> tokens, size_t at_once) {
  Floats all(tokens.size() * engine.decoder().vocab_size);
  for (size_t start = 0; start < tokens.size(); start += at_once) {
    Work work{id, tokens.subspan(start, std::min(at_once, tokens.size() - start))};
    engine.step({&work, 1}, Logits::all, &all[start * engine.decoder().vocab_size]);
  }
  return all;
}

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

bool accepts(const TinyModel& model) {
  save(model);
  return Engine(kPath, {}).refuses_candidates().empty();
}

void test_all_candidates_are_exact(const TinyModel& model) {
  Ids tokens = some_tokens(kTokens, model.vocab);
  Engine engine(kPath, {.threads = 2, .context = 512});
  Floats expected = run(engine, engine.new_sequence(kPrompt), tokens, 1);
  for (size_t at_once : {1, 3, 37}) {
    engine.reset_stats();
    SequenceId id = engine.new_sequence(kPrompt, std::make_unique<Drawn>(model, 2.0));
    CHECK(same_bits(run(engine, id, tokens, at_once), expected));
    Stats stats = engine.stats();
    CHECK(stats.limited == kTokens && stats.candidates[0].by_token == kTokens * model.neurons);
    engine.free(id);
  }
}

void test_own_candidates_alone(const TinyModel& model) {
  Ids tokens = some_tokens(kTokens, model.vocab);
  auto drawn = [&](uint64_t seed = 0) { return std::make_unique<Drawn>(model, 0.4, kPrompt, seed); };
  Engine first(kPath, {.context = 256});
  Floats exact = run(first, first.new_sequence(kPrompt), tokens, 1);
  SequenceId limited = first.new_sequence(kPrompt, drawn());
  Floats expected = run(first, limited, tokens, 1);
  CHECK(!same_bits(expected, exact) && same_bits(exact, run(first, first.new_sequence(kPrompt), tokens, 1)));
  auto [within, outside] = dynamic_cast<const Drawn*>(first.policy(limited))->count();
  CHECK(within > 0 && outside == 0);
  for (size_t threads : {1, 2, 3})
    for (bool skip : {true, false})
      for (size_t at_once : {1, 3, 17, 37}) {
        Engine engine(kPath, {.threads = threads, .context = 256, .skip = skip});
        SequenceId id = engine.new_sequence(kPrompt, drawn());
        CHECK(same_bits(run(engine, id, tokens, at_once), expected));
        CHECK(dynamic_cast<const Drawn*>(engine.policy(id))->count().first == within);
      }
}

// Beside sequences with other candidates, and one without.
void test_neighbours(const TinyModel& model) {
  Ids tokens = some_tokens(kTokens, model.vocab);
  size_t vocab = model.vocab;
  for (size_t threads : {1, 3}) {
    Engine engine(kPath, {.threads = threads, .context = 1024});
    for (bool has_exact : {false, true}) {
      std::vector<SequenceId> ids;
      std::vector<Floats> alone;
      for (uint64_t seed : {1, 2, 3}) {
        auto make = [&] {
          return engine.new_sequence(kPrompt, has_exact && seed == 2
                                                  ? nullptr
                                                  : std::make_unique<Drawn>(model, 0.3, 3 * seed, seed));
        };
        SequenceId id = make();
        alone.push_back(run(engine, id, tokens, 1));
        engine.free(id);
        ids.push_back(make());
      }
      Floats rows(3 * vocab);
      for (size_t t = 0; t < kTokens; ++t) {
        std::vector<Work> work;
        for (SequenceId id : ids) work.push_back({id, {&tokens[t], 1}});
        engine.step(work, Logits::all, rows.data());
        for (size_t i = 0; i < 3; ++i)
          CHECK(std::memcmp(&rows[i * vocab], &alone[i][t * vocab], vocab * sizeof(float)) == 0);
      }
      for (SequenceId id : ids) engine.free(id);
    }
  }
}

void test_bytes(const TinyModel& model) {
  Ids tokens = some_tokens(kTokens, model.vocab);
  Engine engine(kPath, {.context = 256});
  for (Product product : {Product::dot, Product::scatter})
    engine.set_crossover(product, model.dtype, 1, 1.0f);
  run(engine, engine.new_sequence(kPrompt), tokens, 1);
  uint64_t exact = engine.stats().weight_bytes;
  engine.reset_stats();
  run(engine, engine.new_sequence(kPrompt, std::make_unique<Drawn>(model, 0.0)), tokens, 1);
  Stats none = engine.stats();
  const StoredRows& w = engine.decoder().layers[0].first().stored;
  uint64_t all_rows = kTokens * model.layers * model.neurons * (w.stride + w.scale_bytes());
  CHECK(none.limited == kTokens && none.candidates[1].by_token == 0 && none.fired[0] == 0);
  CHECK(exact - none.weight_bytes >= all_rows);
}

// What they wrote is not the exact mode's, so nobody may take it over.
void test_inexact_blocks_are_not_shared(const TinyModel& model) {
  Ids tokens = some_tokens(kTokens, model.vocab);
  Engine engine(kPath, {.context = 256});
  run(engine, engine.new_sequence(kPrompt, std::make_unique<Drawn>(model, 0.4, 31)), tokens, 1);
  SequenceId id = engine.new_sequence(kPrompt);
  CHECK(engine.reuse_prefix(id, tokens) == 0);
  run(engine, engine.new_sequence(kPrompt, std::make_unique<Drawn>(model, 0.4, 32)), tokens, 1);
  CHECK(engine.reuse_prefix(id, tokens) == kKvBlock);
  SequenceId limited = engine.new_sequence(kPrompt, std::make_unique<Drawn>(model, 0.4, 32));
  CHECK(engine.reuse_prefix(limited, tokens) == 0);  // it says that it must see all
}

void test_refusals() {
  for (const TinyModel& model : tiny_models(Dtype::f32)) {
    std::set<std::string> served{"bundle",     "plain",     "drelu",    "parallel",
                                 "post norms", "for reuse", "predicted"};
    if (accepts(model) != served.count(model.name)) std::fprintf(stderr, "%s\n", model.name.c_str());
    CHECK(accepts(model) == served.count(model.name));
    if (accepts(model)) continue;
    Engine engine(kPath, {});
    CHECK(
        throws<std::invalid_argument>([&] { engine.new_sequence(0, std::make_unique<Drawn>(model, 1.0)); }));
  }
}

}  // namespace

int main() {
  test_refusals();
  for_each_isa([] {
    for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::int8, Dtype::int4})
      for (const TinyModel& model : tiny_models(dtype)) {
        if (!accepts(model)) continue;
        test_all_candidates_are_exact(model);
        test_own_candidates_alone(model);
        test_neighbours(model);
        test_bytes(model);
      }
  });
  TinyModel bundle{.name = "bundle"};
  save(bundle);
  test_inexact_blocks_are_not_shared(bundle);
  std::remove(kPath.c_str());
}
