// Neuron reuse: most tokens compute only neurons that were active lately.
//
// Open tokens compute all neurons; frozen ones those of a set that earlier tokens made. What decides is a
// function of the sequence's past alone: its positions, and which neurons each of them had active. So
// truncation, which forgets positions, leaves nothing behind, and the same tokens give the same bits again.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "active_set.h"

namespace relufy {

struct ReuseSettings {
  enum class Policy { window, prompt, blocks, adaptive };

  Policy policy = Policy::window;
  // The prompt and the token after it are open; then come period - 1 frozen ones, one that is open, and so
  // on. Blocks: `period` open ones, as many frozen ones, and so on. Adaptive: one opens at the latest then.
  size_t period = 8;
  size_t window = 32;   // window, adaptive: the set is what these last tokens, up to the open one, had active
  double share = 0.5;   // prompt: the share of neurons that put out most in the prompt
  bool resets = false;  // blocks: the set is that of the last open block, not of all before it
  double most_missed = 0.1;  // adaptive: opens above this share of active neurons that the set misses
  bool is_control = false;   // sets of the same sizes, drawn at random
};

class Reuse : public ActiveSetPolicy {
 public:
  struct Shape {
    size_t layers, neurons;
  };

  // Throws std::invalid_argument for settings that make no sense. Positions below `prompt_length` are open.
  Reuse(Shape shape, const ReuseSettings& settings, size_t prompt_length);

  // A copy for a fork with other settings: the sequence's last position, of `length`, counts as the open one
  // before frozen ones. Throws std::invalid_argument if this one did not keep what they ask for.
  std::unique_ptr<Reuse> with(const ReuseSettings& settings, size_t length) const;

  bool is_open(size_t position) const;

  std::unique_ptr<ActiveSetPolicy> fork() const override { return std::make_unique<Reuse>(*this); }
  void check_truncate(size_t length) const override;
  void truncate(size_t length) override;
  size_t num_unseen() const override;
  size_t num_exact() const override { return first_frozen_; }
  void reserve(size_t first, size_t count) override;
  size_t together(size_t first, size_t count) const override;
  void begin(size_t first, size_t count) override;
  void end(size_t first, size_t count) override;
  const uint64_t* candidates(size_t layer, size_t position) const override;
  uint64_t* active(size_t layer, size_t position) override;
  bool has_sums(size_t position) const override;
  void add(size_t layer, size_t position, const float* neurons) override;

 private:
  using Policy = ReuseSettings::Policy;
  using Set = std::vector<uint64_t>;  // of all layers
  static constexpr size_t kNone = SIZE_MAX;

  // What a position leaves behind, shared by forks and never changed once written.
  struct Record {
    Set active;
    bool is_open = true;               // adaptive: as it was decided
    uint32_t sampled = 0, missed = 0;  // adaptive: active neurons of the sample, and those outside the set
  };
  struct Range {
    size_t first, end;
  };

  bool is(Policy policy) const { return settings_.policy == policy; }
  bool keeps(size_t position) const;
  bool decides_to_open(size_t position) const;
  size_t last_open(size_t position) const;
  Range sources(size_t position) const;
  void make_set(size_t position);
  void collect(Range range);
  void select_most();
  void draw_control();
  void add_sample(size_t position);
  uint64_t sample(size_t layer, size_t word, size_t position) const;
  void count_missed(size_t position);

  Shape shape_;
  ReuseSettings settings_;
  size_t prompt_length_, start_;                  // the period begins at `start_`
  size_t words_;                                  // of a layer
  std::vector<std::shared_ptr<Record>> records_;  // by position; null where nothing is kept
  Set set_;                                       // what frozen tokens may use, made of
  Range made_{0, kNone};                          // these positions; kNone: there is none
  Set limited_;                                   // adaptive: with the sample
  size_t first_frozen_ = kNone;
  std::shared_ptr<std::vector<float>> sums_;  // prompt: layers x neurons; shared by forks until one adds
  size_t num_summed_ = 0;                     // positions
};

}  // namespace relufy
