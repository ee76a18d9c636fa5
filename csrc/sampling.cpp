#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "logits_row.h"
#include "mix.h"

namespace relufy {
namespace {

using row::exponential, row::kInfinity, row::most_of, row::sum_of;

constexpr size_t kBlock = 256;          // tokens of a row that are summed, or passed over, together
constexpr size_t kFewCandidates = 512;  // that may be gathered before the least are dropped

size_t num_blocks(size_t n) { return (n + kBlock - 1) / kBlock; }

// The logit whose probability is `share` of that of the greatest.
float logit_at(double share, float most, double temperature) {
  return static_cast<float>(most + temperature * std::log(share));
}

float next_above(float x) { return std::nextafter(x, kInfinity); }

constexpr auto comes_first = [](const auto& a, const auto& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
};

}  // namespace

double uniform(uint64_t seed, uint64_t position) {
  return static_cast<double>(mix(mix(seed) + position * 0x9E3779B97F4A7C15u) >> 11) * 0x1p-53;
}

int32_t draw(std::span<const float> weights, double u) {
  double target = 0.0;
  for (float weight : weights) target += weight;
  target *= u;
  int32_t token = 0;  // the last one that can be, if roundings lead past it
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] == 0.0f) continue;
    token = static_cast<int32_t>(i);
    target -= weights[i];
    if (target < 0.0) break;
  }
  return token;
}

Sampler::Sampler(size_t vocab_size)
    : vocab_size_(vocab_size),
      adjusted_(vocab_size),
      generated_(vocab_size),
      is_past_(vocab_size),
      block_most_(num_blocks(vocab_size)),
      block_sums_(num_blocks(vocab_size)) {}

void Sampler::check(const Sampling& sampling) const {
  bool is_in_range = (sampling.temperature == 0.0 || sampling.temperature >= 1e-6) && sampling.top_p > 0.0 &&
                     sampling.top_p <= 1.0 && sampling.min_p >= 0.0 && sampling.min_p <= 1.0;
  if (!is_in_range) throw std::invalid_argument("temperature, top_p or min_p is out of range");
  for (auto [token, bias] : sampling.logit_bias)
    if (token < 0 || static_cast<size_t>(token) >= vocab_size_)
      throw std::invalid_argument("logit_bias names token " + std::to_string(token) +
                                  ", which is not in the vocabulary of " + std::to_string(vocab_size_));
}

// The most likely token, the lowest of equals.
Sampler::Candidate Sampler::scan(const float* logits) {
  size_t best = 0;
  for (size_t b = 0; b < block_most_.size(); ++b) {
    size_t first = b * kBlock;
    block_most_[b] = most_of(logits + first, std::min(kBlock, vocab_size_ - first));
    if (std::isnan(block_most_[b]))
      throw std::invalid_argument(
          "a logit is not a finite number: the model's weights are damaged, or too large for this dtype");
    if (block_most_[b] > block_most_[best]) best = b;
  }
  if (block_most_[best] == -kInfinity)
    throw std::invalid_argument("no token is left to choose: every logit is -infinity");
  const float* found = std::find(logits + best * kBlock, logits + vocab_size_, block_most_[best]);
  return {block_most_[best], static_cast<int32_t>(found - logits)};
}

// The logits under bias and penalties: as they came if there are none, else a copy.
const float* Sampler::adjust(const float* logits, const Sampling& s, const Past& past) {
  bool has_penalties = s.repetition_penalty != 1.0 || s.presence_penalty != 0.0 || s.frequency_penalty != 0.0;
  if (s.logit_bias.empty() && !has_penalties) return logits;
  std::copy_n(logits, vocab_size_, adjusted_.data());
  for (auto [token, bias] : s.logit_bias) adjusted_[static_cast<size_t>(token)] += bias;
  if (has_penalties) penalise(s, past);
  return adjusted_.data();
}

void Sampler::penalise(const Sampling& s, const Past& past) {
  auto repetition = static_cast<float>(s.repetition_penalty);
  for (size_t i = past.prompt_length; i < past.tokens.size(); ++i)
    ++generated_[static_cast<size_t>(past.tokens[i])];
  for (int32_t id : past.tokens) {
    auto token = static_cast<size_t>(id);
    if (std::exchange(is_past_[token], 1)) continue;
    float& logit = adjusted_[token];
    if (s.repetition_penalty != 1.0) logit = logit < 0.0f ? logit * repetition : logit / repetition;
    if (generated_[token] == 0) continue;
    logit -= static_cast<float>(s.frequency_penalty * generated_[token]);
    logit -= static_cast<float>(s.presence_penalty);
  }
  for (int32_t id : past.tokens) {
    is_past_[static_cast<size_t>(id)] = 0;
    generated_[static_cast<size_t>(id)] = 0;
  }
}

// The sum of e^(scale * (logit - most)) over what is kept; block_sums_ has its parts.
double Sampler::sum(const float* logits, float most, float scale, Cut cut) {
  double total = 0.0;
  for (size_t b = 0; b < block_sums_.size(); ++b) {
    size_t first = b * kBlock, end = std::min(first + kBlock, vocab_size_);
    block_sums_[b] = 0.0;
    if (block_most_[b] < cut.logit) continue;
    size_t after = std::clamp(static_cast<size_t>(cut.last) + 1, first, end);  // from here on equals are out
    block_sums_[b] += sum_of(logits + first, after - first, most, scale, cut.logit);
    if (after < end)
      block_sums_[b] += sum_of(logits + after, end - after, most, scale, next_above(cut.logit));
    total += block_sums_[b];
  }
  return total;
}

void Sampler::gather_block(const float* logits, size_t block, float floor) {
  for (size_t i = block * kBlock; i < std::min((block + 1) * kBlock, vocab_size_); ++i)
    if (logits[i] >= floor) candidates_.push_back({logits[i], static_cast<int32_t>(i)});
}

// candidates_ <- the tokens whose logits are at least `floor`.
void Sampler::gather(const float* logits, float floor) {
  candidates_.clear();
  for (size_t b = 0; b < block_most_.size(); ++b)
    if (block_most_[b] >= floor) gather_block(logits, b, floor);
}

// candidates_ <- the `count` tokens of the greatest logits and all ties with the last, in any order; returns
// the last one's logit.
float Sampler::gather_most(const float* logits, size_t count) {
  float floor = -kInfinity;
  candidates_.clear();
  auto drop_least = [&] {
    if (candidates_.size() <= count) return;
    auto last = candidates_.begin() + static_cast<ptrdiff_t>(count) - 1;
    std::nth_element(candidates_.begin(), last, candidates_.end(), comes_first);
    floor = last->logit;
    std::erase_if(candidates_, [floor](const Candidate& c) { return c.logit < floor; });
  };
  size_t limit = std::max(2 * count, kFewCandidates);
  for (size_t b = 0; b < block_most_.size(); ++b) {
    if (block_most_[b] < floor) continue;
    gather_block(logits, b, floor);
    if (candidates_.size() < limit) continue;
    drop_least();
    limit = std::max(limit, 2 * candidates_.size());  // ties are not dropped
  }
  drop_least();
  return floor;
}

// Where top-k, top-p and min-p, one after the other, end what is kept.
Sampler::Cut Sampler::cut(const float* logits, const Sampling& s, float most, float scale) {
  Cut cut;
  bool has_top_k = s.top_k > 0 && s.top_k < vocab_size_;
  if (has_top_k) cut.logit = gather_most(logits, s.top_k);
  if (s.top_p < 1.0) {
    double total = 0.0;
    if (has_top_k) {
      for (const Candidate& c : candidates_) total += exponential((c.logit - most) * scale);
    } else {
      total = sum(logits, most, scale, cut);
      // All that is less likely than this makes up less than 1 - top_p (halved: the sum is rounded).
      double share = (1.0 - s.top_p) * total / static_cast<double>(vocab_size_) / 2;
      gather(logits, std::min(logit_at(share, most, s.temperature), most));
    }
    cut = nucleus(s.top_p * total, most, scale);
  }
  if (s.min_p > 0.0) {
    float floor = logit_at(s.min_p, most, s.temperature);
    if (floor > cut.logit) cut = {floor, Cut{}.last};
  }
  return cut;
}

// The first of candidates_, the most likely first, with which their sum reaches `mass`.
Sampler::Cut Sampler::nucleus(double mass, float most, float scale) {
  auto first = candidates_.begin(), end = candidates_.end();
  auto weight = [&](const Candidate& c) {
    return static_cast<double>(exponential((c.logit - most) * scale));
  };
  double before = 0.0;
  while (end - first > 64) {  // halves: the one in which the sum reaches it is looked into further
    auto middle = first + (end - first) / 2;
    std::nth_element(first, middle, end, comes_first);
    double half = 0.0;
    for (auto c = first; c < middle; ++c) half += weight(*c);
    if (before + half >= mass) {
      end = middle;
    } else {
      before += half;
      first = middle;
    }
  }
  std::sort(first, end, comes_first);
  for (; first + 1 < end; ++first) {
    before += weight(*first);
    if (before >= mass) break;
  }
  return {first->logit, first->token};
}

// The token at which the sum over what is kept, in ascending order of tokens, passes `target`.
int32_t Sampler::draw(const float* logits, double target, float most, float scale, Cut cut) const {
  size_t block = 0;
  for (size_t b = 0; b < block_sums_.size(); ++b) {
    if (block_sums_[b] == 0.0) continue;
    block = b;
    if (target < block_sums_[b]) break;
    target -= block_sums_[b];
  }
  int32_t token = 0;  // the last one of the block, if roundings lead past its end
  for (size_t i = block * kBlock; i < std::min((block + 1) * kBlock, vocab_size_); ++i) {
    auto id = static_cast<int32_t>(i);
    float weight = exponential((logits[i] - most) * scale);
    if (!(logits[i] > cut.logit || (logits[i] == cut.logit && id <= cut.last)) || weight == 0.0f) continue;
    token = id;
    target -= weight;
    if (target < 0.0) break;
  }
  return token;
}

// Of the row that was scanned.
std::vector<TokenLogprob> Sampler::top(const float* logits, size_t count, double log_total) {
  count = std::min(count, vocab_size_);
  if (count == 0) return {};
  gather_most(logits, count);
  auto end = candidates_.begin() + static_cast<ptrdiff_t>(count);
  std::partial_sort(candidates_.begin(), end, candidates_.end(), comes_first);
  std::vector<TokenLogprob> result;
  for (auto c = candidates_.begin(); c < end; ++c)
    result.push_back({c->token, static_cast<float>(c->logit - log_total)});
  return result;
}

Choice Sampler::choose(const float* logits, const Sampling& s, const Past& past, size_t num_logprobs) {
  Candidate most = scan(logits);
  double log_total = most.logit + std::log(sum(logits, most.logit, 1.0f, Cut{}));
  Choice choice{most.token, 0.0f, top(logits, num_logprobs, log_total)};
  const float* adjusted = adjust(logits, s, past);
  if (adjusted != logits) most = scan(adjusted);
  choice.token = most.token;
  if (s.temperature > 0.0) {
    auto scale = static_cast<float>(1.0 / s.temperature);
    Cut kept = cut(adjusted, s, most.logit, scale);
    double total = sum(adjusted, most.logit, scale, kept);
    choice.token = draw(adjusted, uniform(s.seed, past.tokens.size()) * total, most.logit, scale, kept);
  }
  choice.logprob = static_cast<float>(logits[choice.token] - log_total);
  return choice;
}

Choice Sampler::describe(const float* logits, int32_t token, size_t num_logprobs) {
  float most = scan(logits).logit;
  double log_total = most + std::log(sum(logits, most, 1.0f, Cut{}));
  return {token, static_cast<float>(logits[token] - log_total), top(logits, num_logprobs, log_total)};
}

void Sampler::probabilities(const float* logits, const Sampling& s, const Past& past, float* out) {
  const float* adjusted = adjust(logits, s, past);
  Candidate most = scan(adjusted);
  std::fill_n(out, vocab_size_, 0.0f);
  if (s.temperature == 0.0) {
    out[most.token] = 1.0f;
    return;
  }
  auto scale = static_cast<float>(1.0 / s.temperature);
  Cut kept = cut(adjusted, s, most.logit, scale);
  double total = sum(adjusted, most.logit, scale, kept);
  for (size_t i = 0; i < vocab_size_; ++i)
    if (adjusted[i] > kept.logit || (adjusted[i] == kept.logit && static_cast<int32_t>(i) <= kept.last))
      out[i] = static_cast<float>(exponential((adjusted[i] - most.logit) * scale) / total);
}

}  // namespace relufy
