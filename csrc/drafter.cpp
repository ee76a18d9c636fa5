#include "drafter.h"

#include <algorithm>
#include <cmath>

#include "mix.h"
#include "reuse.h"

namespace relufy {

double uniform(uint64_t seed, uint64_t position, Stream stream) {
  return uniform(mix(seed ^ static_cast<uint64_t>(stream)), position);
}

void LookupDrafter::propose(const Text& text, size_t most, const Sampling&, Proposal& proposal) {
  proposal.clear();
  std::span<const int32_t> tokens = text.tokens;
  size_t longest = 0, after = 0;
  for (size_t end = tokens.size() - 1; end > 0 && longest < kMostMatch; --end) {
    size_t length = 0, limit = std::min(end, kMostMatch);
    while (length < limit && tokens[end - 1 - length] == tokens[tokens.size() - 1 - length]) ++length;
    if (length <= longest) continue;
    longest = length;
    after = end;
  }
  if (longest < least_match_) return;
  for (size_t i = after; proposal.tokens.size() < most; ++i)
    proposal.tokens.push_back(i < tokens.size() ? tokens[i] : proposal.tokens[i - tokens.size()]);
}

ModelDrafter::ModelDrafter(Engine& engine, size_t vocab_size, double least_probability)
    : engine_(engine),
      logits_(engine.decoder().vocab_size),
      sampler_(std::min(vocab_size, engine.decoder().vocab_size), least_probability) {}

ModelDrafter::~ModelDrafter() {
  if (sequence_) engine_.free(*sequence_);
}

bool ModelDrafter::knows(std::span<const int32_t> tokens) const {
  return std::all_of(tokens.begin(), tokens.end(), [this](int32_t token) {
    return static_cast<size_t>(token) < engine_.decoder().vocab_size;
  });
}

// Forgets what does not belong to the text, and returns how many of its tokens are left.
size_t ModelDrafter::go_back_to(const Text& text) {
  auto differs = std::mismatch(known_.begin(), known_.end(), text.tokens.begin(), text.tokens.end()).first;
  size_t common = std::min(static_cast<size_t>(differs - known_.begin()), text.tokens.size() - 1);
  if (!sequence_ || common == 0 || prompt_length_ != text.prompt_length) {
    if (sequence_) engine_.free(*std::exchange(sequence_, std::nullopt));
    known_.clear();
    sequence_ = engine_.new_sequence(prompt_length_ = text.prompt_length);
    common = engine_.reuse_prefix(*sequence_, text.tokens);
  } else if (common < known_.size()) {
    engine_.truncate(*sequence_, common);
  }
  known_.assign(text.tokens.begin(), text.tokens.begin() + static_cast<ptrdiff_t>(common));
  return common;
}

void ModelDrafter::step(std::span<const int32_t> tokens, Logits wanted) {
  const Work work{*sequence_, tokens};
  engine_.step({&work, 1}, wanted, logits_.data());
  known_.insert(known_.end(), tokens.begin(), tokens.end());
}

void ModelDrafter::read(const Text& text) {
  if (!knows(text.tokens)) return;
  size_t common = go_back_to(text);
  std::span<const int32_t> rest = text.tokens.subspan(common, text.tokens.size() - 1 - common);
  if (!rest.empty()) step(rest, Logits::none);
}

void ModelDrafter::propose(const Text& text, size_t most, const Sampling& sampling, Proposal& proposal) {
  sampler_.begin(sampling, proposal);
  if (most == 0 || !knows(text.tokens)) return;
  step(text.tokens.subspan(go_back_to(text)), Logits::last);
  while (sampler_.choose(logits_.data(), {known_, prompt_length_}, proposal) &&
         proposal.tokens.size() < most) {
    int32_t token = proposal.tokens.back();
    step({&token, 1}, Logits::last);
  }
}

SelfDrafter::SelfDrafter(Engine& engine, size_t window, double least_probability)
    : engine_(engine),
      window_(window),
      logits_(engine.decoder().vocab_size),
      sampler_(engine.decoder().vocab_size, least_probability) {}

void SelfDrafter::propose(const Text& text, size_t most, const Sampling& sampling, Proposal& proposal) {
  sampler_.begin(sampling, proposal);
  if (most == 0) return;
  SequenceId id = engine_.fork(text.sequence, [this, most](const ActiveSetPolicy* own, size_t length) {
    auto kept = dynamic_cast<const Reuse*>(own);
    if (!kept) throw std::invalid_argument("only a sequence with reuse, of period 1, can draft for itself");
    return kept->with({.period = most + 1, .window = window_}, length);
  });
  try {
    tokens_.assign(text.tokens.begin(), text.tokens.end());
    do {
      const Work work{id, {&tokens_.back(), 1}};
      engine_.step({&work, 1}, Logits::last, logits_.data());
      if (!sampler_.choose(logits_.data(), {tokens_, text.prompt_length}, proposal)) break;
      tokens_.push_back(proposal.tokens.back());
    } while (proposal.tokens.size() < most);
  } catch (...) {
    engine_.free(id);
    throw;
  }
  engine_.free(id);
}

void DraftSampler::begin(const Sampling& sampling, Proposal& proposal) {
  proposal.clear();
  proposal.row_size = vocab_size_;
  sampling_ = sampling;
  std::erase_if(sampling_.logit_bias,
                [this](auto bias) { return static_cast<size_t>(bias.first) >= vocab_size_; });
}

bool DraftSampler::choose(const float* logits, const Past& past, Proposal& proposal) {
  if (sampling_.temperature == 0.0) {
    Choice choice = sampler_.choose(logits, sampling_, past);
    if (std::exp(choice.logprob) < least_probability_) return false;
    proposal.tokens.push_back(choice.token);
    return true;
  }
  size_t before = proposal.rows.size();
  proposal.rows.resize(before + vocab_size_);
  std::span<float> row(&proposal.rows[before], vocab_size_);
  sampler_.probabilities(logits, sampling_, past, row.data());
  if (*std::max_element(row.begin(), row.end()) < least_probability_) {
    proposal.rows.resize(before);
    return false;
  }
  proposal.tokens.push_back(draw(row, uniform(sampling_.seed, past.tokens.size(), Stream::draft)));
  return true;
}

}  // namespace relufy
