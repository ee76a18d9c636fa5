// Speculative decoding: a drafter proposes the next tokens, and the model verifies them all in one step,
// which reads the weights that at least one of them needs, once.
//
// It changes speed, and nothing else. Where tokens were proposed without a draw, the model makes its own
// choice at each place, with its own random numbers, until one differs: exactly what plain decoding gives, in
// greedy decoding and in sampling. A token that was drawn from the drafter's distribution q is accepted with
// probability min(1, p / q), else one is drawn from what p has more than q: together that is p (Leviathan et
// al. 2023, Fast Inference from Transformers via Speculative Decoding, algorithm 1 and appendix A.1), though
// the random numbers, and so the text, are others than those of plain decoding.
//
// Penalties count what precedes a place. A random number is a hash of the request's seed, of the place, and
// of what it is for: a proposal, its acceptance, or the model's own choice (alone, after a rejection, or
// after the last proposal). How many tokens are proposed depends on the request and on what was written,
// never on time, so a request gives the same text whatever
// else runs; but where others fill the KV cache, a draft may lack the room for a proposal.
#pragma once

#include "drafter.h"

namespace relufy {

struct SpeculationOptions {
  size_t gamma = 4;          // tokens that are proposed at most
  bool is_adaptive = false;  // fewer after a rejection, more after none
};

// Of the verifications of a number of tokens: how many there were, and what they used.
struct VerifyUse {
  uint64_t steps = 0;
  Stats stats = {};
};

struct SpeculationCounts {
  uint64_t rounds = 0, drafted = 0, accepted = 0, chosen = 0;
  std::vector<uint64_t> tested_at, accepted_at;  // by place: those before it had been accepted
  std::vector<VerifyUse> by_size;                // by the number of tokens verified together
  double draft_seconds = 0.0, verify_seconds = 0.0;
  uint64_t draft_weight_bytes = 0, draft_kv_bytes = 0;
};

// Of one request, whose text it follows from call to call. Thread-safe: calls queue.
class Speculator {
 public:
  Speculator(Engine& engine, std::unique_ptr<Drafter> drafter, SpeculationOptions options);

  // Lets the drafter read a sequence and the token after it, so that the first round need not.
  void read(SequenceId id, int32_t next);

  // As Engine::decode, in whole rounds: ends with the round in which `count` tokens are reached, after
  // `most`, or after one of `stops`.
  std::vector<Choice> decode(SequenceId id, std::span<const int32_t> tokens, size_t count, size_t most,
                             std::span<const int32_t> stops, const Sampling& sampling, size_t num_logprobs);

  SpeculationCounts counts();

 private:
  bool round(SequenceId id, size_t most, std::span<const int32_t> stops, const Sampling& sampling,
             size_t num_logprobs, std::vector<Choice>& chosen);
  void propose(SequenceId id, size_t most, const Sampling& sampling);
  void verify(SequenceId id, std::span<const int32_t> tokens);
  Choice choose_at(size_t place, const Past& past, const Sampling& sampling, size_t num_logprobs);
  Choice accept_or_draw(size_t place, const Past& past, const Sampling& sampling, size_t num_logprobs);
  void count(size_t tested, size_t accepted);

  Engine& engine_;
  std::unique_ptr<Drafter> drafter_;
  SpeculationOptions options_;
  size_t gamma_;
  size_t prompt_length_ = 0;
  std::vector<int32_t> text_;
  Proposal proposal_;
  std::vector<float> logits_, probabilities_, residual_;
  Sampler sampler_;
  SpeculationCounts counts_;
  std::mutex mutex_;
};

}  // namespace relufy
