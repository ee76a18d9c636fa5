// Chooses a token from a row of logits.
//
// In this order: logit bias, repetition penalty, frequency and presence penalty (vLLM's order); then
// temperature, top-k, top-p, min-p (the order of Hugging Face's generate, whose processors keep the same
// sets). Each of the last three keeps the most likely tokens down to some point, so together they are one
// cut, which needs a partial selection and never a sort of the vocabulary.
//
// The random number is a hash of the seed and of the position of the token that is chosen: a sequence that is
// rolled back and decoded again gives the same tokens, and nothing else has a say in it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

namespace relufy {

struct Sampling {
  double temperature = 0.0;         // 0 takes the most likely token, the lowest of equals
  size_t top_k = 0;                 // 0: all; ties with the k-th are kept, as Hugging Face does
  double top_p = 1.0, min_p = 0.0;  // of equals, top-p keeps the lower tokens
  double repetition_penalty = 1.0;  // divides (negative: multiplies) the logits of all tokens of the past
  double presence_penalty = 0.0;    // is subtracted for each token that was generated,
  double frequency_penalty = 0.0;   // and this once for each time
  std::vector<std::pair<int32_t, float>> logit_bias = {};  // is added; -inf rules a token out
  uint64_t seed = 0;
};

// What came before the token that is chosen. Tokens from prompt_length on were generated.
struct Past {
  std::span<const int32_t> tokens;
  size_t prompt_length = 0;
};

using TokenLogprob = std::pair<int32_t, float>;

// `logprob` is the natural logarithm of the token's probability in the model's own distribution: of the
// logits as they came, at temperature 1. `top` has the most likely tokens, in order, the lower first of
// equals.
struct Choice {
  int32_t token;
  float logprob;
  std::vector<TokenLogprob> top;
};

// Random numbers in [0, 1), a function of their arguments.
double uniform(uint64_t seed, uint64_t position);

// The token at which the sum of weights, in ascending order, passes the share `u` of their total: of weights
// that are at least 0, not all of them 0.
int32_t draw(std::span<const float> weights, double u);

// With scratch memory for one vocabulary; for one thread at a time.
class Sampler {
 public:
  explicit Sampler(size_t vocab_size);

  // Throws std::invalid_argument if a bias names a token outside of the vocabulary.
  void check(const Sampling& sampling) const;

  // Both throw std::invalid_argument if a logit is not a number (or +infinity), or if no token is left.
  Choice choose(const float* logits, const Sampling& sampling, const Past& past, size_t num_logprobs = 0);

  // A token that was chosen by other means, with what `choose` tells of it.
  Choice describe(const float* logits, int32_t token, size_t num_logprobs = 0);

  // The distribution that `choose` draws from: vocab_size floats that sum to 1.
  void probabilities(const float* logits, const Sampling& sampling, const Past& past, float* out);

 private:
  struct Candidate {
    float logit;
    int32_t token;
  };
  // Kept is what is above `logit`, and what equals it up to the token `last`.
  struct Cut {
    float logit = -std::numeric_limits<float>::infinity();
    int32_t last = std::numeric_limits<int32_t>::max();
  };

  Candidate scan(const float* logits);
  const float* adjust(const float* logits, const Sampling& sampling, const Past& past);
  void penalise(const Sampling& sampling, const Past& past);
  double sum(const float* logits, float most, float scale, Cut cut);
  void gather_block(const float* logits, size_t block, float floor);
  void gather(const float* logits, float floor);
  float gather_most(const float* logits, size_t count);
  Cut cut(const float* logits, const Sampling& sampling, float most, float scale);
  Cut nucleus(double mass, float most, float scale);
  int32_t draw(const float* logits, double target, float most, float scale, Cut cut) const;
  std::vector<TokenLogprob> top(const float* logits, size_t count, double log_total);

  size_t vocab_size_;
  std::vector<float> adjusted_;
  std::vector<uint32_t> generated_;  // how often, by token; zero between calls
  std::vector<uint8_t> is_past_;     // by token; zero between calls
  std::vector<float> block_most_;    // the greatest logit of each block of the row that was scanned
  std::vector<double> block_sums_;
  std::vector<Candidate> candidates_;
};

}  // namespace relufy
