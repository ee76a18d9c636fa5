#include "drafter.h"

#include <algorithm>
#include <cmath>

#include "mix.h"

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
      vocab_size_(std::min(vocab_size, engine.decoder().vocab_size)),
      least_probability_(least_probability),
      logits_(engine.decoder().vocab_size),
      sampler_(vocab_size_) {}

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
  proposal.clear();
  proposal.row_size = vocab_size_;
  if (most == 0 || !knows(text.tokens)) return;
  step(text.tokens.subspan(go_back_to(text)), Logits::last);
  Sampling own = sampling;
  std::erase_if(own.logit_bias, [this](auto bias) { return static_cast<size_t>(bias.first) >= vocab_size_; });
  while (choose({known_, prompt_length_}, own, proposal) && proposal.tokens.size() < most) {
    int32_t token = proposal.tokens.back();
    step({&token, 1}, Logits::last);
  }
}

// Proposes one more token, from the last step's logits, or returns false.
bool ModelDrafter::choose(const Past& past, const Sampling& sampling, Proposal& proposal) {
  if (sampling.temperature == 0.0) {
    Choice choice = sampler_.choose(logits_.data(), sampling, past);
    if (std::exp(choice.logprob) < least_probability_) return false;
    proposal.tokens.push_back(choice.token);
    return true;
  }
  size_t before = proposal.rows.size();
  proposal.rows.resize(before + vocab_size_);
  std::span<float> row(&proposal.rows[before], vocab_size_);
  sampler_.probabilities(logits_.data(), sampling, past, row.data());
  if (*std::max_element(row.begin(), row.end()) < least_probability_) {
    proposal.rows.resize(before);
    return false;
  }
  proposal.tokens.push_back(draw(row, uniform(sampling.seed, past.tokens.size(), Stream::draft)));
  return true;
}

}  // namespace relufy
