// Who decides which neurons a token computes: without a policy, its own gate does, over all of them.
//
// A policy belongs to a sequence, and is forked, truncated and freed with it. It names candidates: neurons
// outside of them count as inactive, and no weight of theirs is read. What a token gets depends on its own
// candidates alone, whoever shares its step; with all neurons as candidates, it is the same bits as without a
// policy.
//
// Sets are bits of 64-bit words, neuron i is bit i % 64 of word i / 64; those after the last are zero.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace relufy {

static inline constexpr size_t set_words(size_t neurons) { return (neurons + 63) / 64; }

class ActiveSetPolicy {
 public:
  virtual ~ActiveSetPolicy() = default;

  virtual std::unique_ptr<ActiveSetPolicy> fork() const = 0;

  // Throws std::invalid_argument where it can't go back to so few positions.
  virtual void check_truncate(size_t length) const { static_cast<void>(length); }
  virtual void truncate(size_t length) = 0;

  // How many of a sequence's first positions it needs to know nothing of: they may come from the KV cache.
  virtual size_t num_unseen() const { return 0; }

  // How many of the first positions have the keys and values of the exact mode, for others to take over.
  virtual size_t num_exact() const = 0;

  // Makes room for `count` more positions, from `first` on. May throw; the others below may not.
  virtual void reserve(size_t first, size_t count) = 0;

  // How many of `count` tokens from position `first` on can go through the layers together: at least one.
  virtual size_t together(size_t first, size_t count) const = 0;

  // Around each such passage through the layers.
  virtual void begin(size_t first, size_t count) = 0;
  virtual void end(size_t first, size_t count) = 0;

  // Whether the file's predictor names candidates, and for which tokens; `candidates` is then null.
  virtual bool has_predictor() const { return false; }
  virtual bool predicts(size_t position) const {
    static_cast<void>(position);
    return false;
  }

  // Called between the two, by many threads at once. The candidates of a token; null for all neurons.
  virtual const uint64_t* candidates(size_t layer, size_t position) const = 0;

  // Where the neurons go that were active (that down read); null where nobody needs them.
  virtual uint64_t* active(size_t layer, size_t position) = 0;

  // Whether it sums up what neurons put out; then that is added, token after token in their order.
  virtual bool has_sums(size_t position) const {
    static_cast<void>(position);
    return false;
  }
  virtual void add(size_t layer, size_t position, const float* neurons) {
    static_cast<void>(layer), static_cast<void>(position), static_cast<void>(neurons);
  }
};

}  // namespace relufy
