#include "speculator.h"

#include <algorithm>
#include <chrono>

namespace relufy {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// sum <- sum + after - before.
void add_between(Stats& sum, const Stats& before, const Stats& after) {
  sum.tokens += after.tokens - before.tokens;
  sum.weight_bytes += after.weight_bytes - before.weight_bytes;
  sum.kv_bytes += after.kv_bytes - before.kv_bytes;
  for (size_t site = 0; site < kNumSites; ++site) {
    sum.used[site].resize(after.used[site].size());
    for (size_t i = 0; i < after.used[site].size(); ++i)
      sum.used[site][i] += after.used[site][i] - before.used[site][i];
  }
}

}  // namespace

Speculator::Speculator(Engine& engine, std::unique_ptr<Drafter> drafter, SpeculationOptions options)
    : engine_(engine),
      drafter_(std::move(drafter)),
      options_(options),
      gamma_(options.gamma),
      sampler_(engine.decoder().vocab_size) {
  counts_.tested_at.resize(options.gamma);
  counts_.accepted_at.resize(options.gamma);
  counts_.by_size.resize(options.gamma + 2);
}

SpeculationCounts Speculator::counts() {
  std::lock_guard lock(mutex_);
  return counts_;
}

void Speculator::read(SequenceId id, int32_t next) {
  std::lock_guard lock(mutex_);
  text_ = engine_.tokens(id);
  text_.push_back(next);
  drafter_->read({text_, engine_.prompt_length(id), id});
}

std::vector<Choice> Speculator::decode(SequenceId id, std::span<const int32_t> tokens, size_t count,
                                       size_t most, std::span<const int32_t> stops, const Sampling& sampling,
                                       size_t num_logprobs) {
  std::lock_guard lock(mutex_);
  if (tokens.empty()) throw std::invalid_argument("a step needs at least one token for each sequence");
  sampler_.check(sampling);
  text_ = engine_.tokens(id);
  prompt_length_ = engine_.prompt_length(id);
  size_t before = text_.size();
  std::vector<Choice> chosen;
  try {
    const Work known{id, tokens.first(tokens.size() - 1)};
    if (!known.tokens.empty()) engine_.step({&known, 1}, Logits::none, nullptr);
    text_.insert(text_.end(), tokens.begin(), tokens.end());
    bool goes_on = true;
    while (goes_on && chosen.size() < std::min(count, most))
      goes_on = round(id, most - chosen.size(), stops, sampling, num_logprobs, chosen);
  } catch (...) {
    engine_.truncate(id, before);
    throw;
  }
  return chosen;
}

// One proposal and its verification; returns whether the text goes on.
bool Speculator::round(SequenceId id, size_t most, std::span<const int32_t> stops, const Sampling& sampling,
                       size_t num_logprobs, std::vector<Choice>& chosen) {
  size_t length = text_.size() - 1, place = 0;
  propose(id, std::min(gamma_, most - 1), sampling);
  size_t proposed = proposal_.tokens.size();
  text_.insert(text_.end(), proposal_.tokens.begin(), proposal_.tokens.end());
  verify(id, std::span(text_).subspan(length));
  bool is_accepted = true, is_end = false;
  for (; is_accepted && !is_end && place <= proposed; ++place) {
    const Past past{std::span(text_).first(length + 1 + place), prompt_length_};
    chosen.push_back(choose_at(place, past, sampling, num_logprobs));
    int32_t token = chosen.back().token;
    is_accepted = place < proposed && token == proposal_.tokens[place];
    is_end = std::find(stops.begin(), stops.end(), token) != stops.end();
  }
  engine_.truncate(id, length + place);
  text_.resize(length + place);
  text_.push_back(chosen.back().token);
  counts_.chosen += place;
  count(std::min(place, proposed), place - !is_accepted);
  return !is_end;
}

void Speculator::propose(SequenceId id, size_t most, const Sampling& sampling) {
  Engine* reader = drafter_->engine();
  Stats before = reader ? reader->stats() : Stats{};
  double start = now();
  try {
    drafter_->propose({text_, prompt_length_, id}, most, sampling, proposal_);
  } catch (const OutOfKv&) {
    proposal_.clear();  // others have taken the room: a plain step needs less
  }
  counts_.draft_seconds += now() - start;
  if (!reader) return;
  Stats after = reader->stats();
  counts_.draft_weight_bytes += after.weight_bytes - before.weight_bytes;
  counts_.draft_kv_bytes += after.kv_bytes - before.kv_bytes;
}

// logits_ <- those of all tokens, which extend the sequence.
void Speculator::verify(SequenceId id, std::span<const int32_t> tokens) {
  const Work work{id, tokens};
  logits_.resize(tokens.size() * engine_.decoder().vocab_size);
  Stats before = engine_.stats();
  double start = now();
  engine_.step({&work, 1}, Logits::all, logits_.data());
  counts_.verify_seconds += now() - start;
  VerifyUse& use = counts_.by_size[tokens.size()];
  ++use.steps;
  add_between(use.stats, before, engine_.stats());
}

Choice Speculator::choose_at(size_t place, const Past& past, const Sampling& sampling, size_t num_logprobs) {
  bool was_drawn = place < proposal_.tokens.size() && !proposal_.rows.empty();
  if (was_drawn) return accept_or_draw(place, past, sampling, num_logprobs);
  const float* logits = &logits_[place * engine_.decoder().vocab_size];
  return sampler_.choose(logits, sampling, past, num_logprobs);
}

Choice Speculator::accept_or_draw(size_t place, const Past& past, const Sampling& sampling,
                                  size_t num_logprobs) {
  size_t vocab_size = engine_.decoder().vocab_size, position = past.tokens.size();
  const float* logits = &logits_[place * vocab_size];
  std::span<const float> q(&proposal_.rows[place * proposal_.row_size], proposal_.row_size);
  std::vector<float>& p = probabilities_;
  p.resize(vocab_size);
  sampler_.probabilities(logits, sampling, past, p.data());
  int32_t token = proposal_.tokens[place];
  auto at = static_cast<size_t>(token);
  if (uniform(sampling.seed, position, Stream::accept) * q[at] >= p[at]) {
    residual_ = p;
    for (size_t i = 0; i < q.size(); ++i) residual_[i] = std::max(0.0f, p[i] - q[i]);
    bool has_any = std::any_of(residual_.begin(), residual_.end(), [](float r) { return r > 0.0f; });
    token = draw(has_any ? residual_ : p, uniform(sampling.seed, position));  // none: p is q but for rounding
  }
  return sampler_.describe(logits, token, num_logprobs);
}

// A place was tested if those before it had been accepted, and no end came before it.
void Speculator::count(size_t tested, size_t accepted) {
  accepted = std::min(accepted, tested);
  size_t proposed = proposal_.tokens.size();
  ++counts_.rounds;
  counts_.drafted += proposed;
  counts_.accepted += accepted;
  for (size_t i = 0; i < tested; ++i) ++counts_.tested_at[i];
  for (size_t i = 0; i < accepted; ++i) ++counts_.accepted_at[i];
  if (!options_.is_adaptive || tested == 0) return;
  if (accepted == tested)
    gamma_ = std::min(options_.gamma, gamma_ + 2);
  else
    gamma_ = std::max<size_t>(1, gamma_ / 2);
}

}  // namespace relufy
