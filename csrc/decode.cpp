// Tokens chosen by the engine: one from a row of logits, or a run of them.
#include <algorithm>

#include "engine.h"

namespace relufy {

// The first `length` tokens of a sequence (all, where it is not given), as sampling reads them.
Past Engine::past(SequenceId id, std::optional<size_t> length) const {
  std::span<const int32_t> tokens = kv_.tokens(id);
  if (length && *length > tokens.size())
    throw std::invalid_argument("a sequence of " + std::to_string(tokens.size()) + " tokens has no first " +
                                std::to_string(*length));
  return {tokens.first(length.value_or(tokens.size())), kv_.prompt_length(id)};
}

Choice Engine::choose(SequenceId id, const float* logits, const Sampling& sampling, size_t num_logprobs,
                      std::optional<size_t> length) {
  std::lock_guard lock(mutex_);
  sampler_.check(sampling);
  return sampler_.choose(logits, sampling, past(id, length), num_logprobs);
}

void Engine::probabilities(SequenceId id, const float* logits, const Sampling& sampling,
                           std::optional<size_t> length, float* out) {
  std::lock_guard lock(mutex_);
  sampler_.check(sampling);
  sampler_.probabilities(logits, sampling, past(id, length), out);
}

std::vector<Choice> Engine::decode(SequenceId id, std::span<const int32_t> tokens, size_t count,
                                   std::span<const int32_t> stops, const Sampling& sampling,
                                   size_t num_logprobs) {
  std::lock_guard lock(mutex_);
  if (count == 0) return {};
  Work work{id, tokens};
  check({&work, 1});
  sampler_.check(sampling);
  size_t before = kv_.length(id);
  check_room(id, count > SIZE_MAX - tokens.size() ? count : tokens.size() + count - 1);
  kv_.check_room(id, tokens.size() + count - 1);  // and nobody else takes any before the end
  std::vector<Choice> chosen;
  ActiveSetPolicy* policy = find_policy(id);
  std::unique_ptr<ActiveSetPolicy> policy_before = policy ? policy->fork() : nullptr;
  try {
    chosen.reserve(count);
    logits_.resize(decoder_.vocab_size);
    while (true) {
      step_locked({&work, 1}, Logits::last, logits_.data());
      chosen.push_back(sampler_.choose(logits_.data(), sampling, past(id, {}), num_logprobs));
      const int32_t& token = chosen.back().token;
      if (chosen.size() == count || std::find(stops.begin(), stops.end(), token) != stops.end()) break;
      work.tokens = {&token, 1};
    }
  } catch (...) {
    kv_.truncate(id, before);
    if (policy) policies_[id] = std::move(policy_before);
    throw;
  }
  return chosen;
}

}  // namespace relufy
