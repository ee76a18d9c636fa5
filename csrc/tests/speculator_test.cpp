// Proposals looked up in a text; and that speculation gives what plain decoding gives, bit for bit, for every
// dtype and layout, with drafts of another model, of the model itself, and of none.
#include "speculator.h"

#include <unistd.h>

#include <fstream>
#include <thread>

#include "packed_model.h"
#include "reuse.h"

namespace {

using Ids = std::vector<int32_t>;

std::string saved(const TinyModel& model, const char* role) {
  std::string path = "speculator_test." + std::to_string(getpid()) + "." + role + ".relufy";
  Bytes bytes = packed(model);
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  return path;
}

Ids looked_up(const Ids& text, size_t most, size_t least_match) {
  Proposal proposal;
  LookupDrafter(least_match).propose({text}, most, {}, proposal);
  CHECK(proposal.rows.empty());
  return proposal.tokens;
}

void test_lookup() {
  CHECK(looked_up({1, 2, 3, 9, 1, 2}, 2, 2) == Ids({3, 9}));
  CHECK(looked_up({1, 2, 3, 9, 1, 2}, 5, 2) == Ids({3, 9, 1, 2, 3}));  // beyond the end: what was proposed
  CHECK(looked_up({5, 2, 3, 9, 1, 2}, 2, 2).empty());
  CHECK(looked_up({5, 2, 3, 9, 1, 2}, 2, 1) == Ids({3, 9}));
  CHECK(looked_up({1, 2, 7, 0, 2, 8, 1, 2}, 1, 1) == Ids({7}));  // the longest, though not the latest
  CHECK(looked_up({1, 2, 7, 1, 2, 8, 1, 2}, 1, 1) == Ids({8}));  // the latest of equals
  CHECK(looked_up({4, 4, 4}, 3, 2) == Ids({4, 4, 4}));
  CHECK(looked_up({4}, 3, 1).empty());
  CHECK(looked_up({4, 4}, 0, 1).empty());
  CHECK(looked_up(Ids(500, 7), 3, 2) == Ids({7, 7, 7}));
}

std::vector<Choice> decoded(Engine& engine, const Ids& prompt, size_t count, const Sampling& sampling) {
  SequenceId id = engine.new_sequence(prompt.size());
  std::vector<Choice> choices = engine.decode(id, prompt, count, {}, sampling, 2);
  engine.free(id);
  return choices;
}

bool same(const std::vector<Choice>& a, const std::vector<Choice>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Choice& x, const Choice& y) {
    return x.token == y.token && x.logprob == y.logprob && x.top == y.top;
  });
}

constexpr size_t kWindow = 2;

// A sequence for one of the drafters below: its policy keeps what a draft by itself needs.
SequenceId new_sequence(Engine& engine, const Ids& prompt, bool drafts_itself) {
  Reuse::Shape shape{engine.decoder().num_layers, engine.decoder().intermediate_size};
  ReuseSettings settings{.period = 1, .window = kWindow};
  if (!drafts_itself) return engine.new_sequence(prompt.size());
  return engine.new_sequence(prompt.size(), std::make_unique<Reuse>(shape, settings, prompt.size()));
}

void test_same_as_plain(const TinyModel& model) {
  TinyModel other = model;
  other.activation = Activation::silu;
  Engine engine(saved(model, "target"), {.threads = 2, .context = 256});
  Engine draft(saved(other, "draft"), {.context = 256}, engine.thread_pool());
  CHECK(draft.threads() == 2);
  enum Kind { lookup, another, same_engine, itself };
  auto drafter = [&](Kind kind) -> std::unique_ptr<Drafter> {
    if (kind == lookup) return std::make_unique<LookupDrafter>(1);
    if (kind == itself) return std::make_unique<SelfDrafter>(engine, kWindow, 0.0);
    return std::make_unique<ModelDrafter>(kind == another ? draft : engine, model.vocab, 0.0);
  };
  Ids prompt = {1, 5, 7, 5, 7, 2, 5};
  const Sampling samplings[] = {{}, {.repetition_penalty = 1.3, .logit_bias = {{3, 0.1f}}}};
  for (const Sampling& sampling : samplings) {
    std::vector<Choice> expected = decoded(engine, prompt, 40, sampling);
    for (Kind kind : {lookup, another, same_engine, itself})
      for (size_t gamma : {1, 3, 8}) {
        if (kind == itself && !engine.refuses_candidates().empty()) continue;
        SequenceId id = new_sequence(engine, prompt, kind == itself);
        Speculator speculator(engine, drafter(kind), {gamma, gamma == 8});
        CHECK(same(speculator.decode(id, prompt, 40, 40, {}, sampling, 2), expected));
        CHECK(engine.length(id) == prompt.size() + 39);
        SpeculationCounts counts = speculator.counts();
        CHECK(counts.chosen == 40 && (kind == lookup || counts.drafted > 0));
        CHECK(kind != same_engine || counts.accepted == counts.drafted);
        engine.free(id);
      }
  }
  CHECK(engine.free_positions() == 256 && draft.free_positions() == 256);
}

// Two engines with the same threads, called from two threads at once.
void test_shared_threads() {
  TinyModel model = tiny_models(Dtype::f32)[0];
  Engine a(saved(model, "target"), {.threads = 2, .context = 256});
  Engine b(saved(model, "draft"), {.context = 256}, a.thread_pool());
  Ids prompt = {1, 5, 7};
  std::vector<Choice> expected = decoded(a, prompt, 50, {});
  auto run = [&](Engine& engine) {
    for (int i = 0; i < 10; ++i) CHECK(same(decoded(engine, prompt, 50, {}), expected));
  };
  std::thread other([&] { run(b); });
  run(a);
  other.join();
}

}  // namespace

int main() {
  test_lookup();
  for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::int8, Dtype::int4})
    for (const TinyModel& model : tiny_models(dtype)) test_same_as_plain(model);
  test_shared_threads();
  for (const char* role : {"target", "draft"}) {
    std::string path = "speculator_test." + std::to_string(getpid()) + "." + role + ".relufy";
    std::remove(path.c_str());
  }
}
