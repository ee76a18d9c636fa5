// The policy "predicted": from a sequence's open tokens on, the file's predictor names each token's
// candidates.
//
// It has no state: what a token gets follows from itself and its past alone.
#pragma once

#include "active_set.h"

namespace relufy {

class Predicted : public ActiveSetPolicy {
 public:
  // The first `num_open` tokens compute all neurons.
  explicit Predicted(size_t num_open) : num_open_(num_open) {}

  std::unique_ptr<ActiveSetPolicy> fork() const override { return std::make_unique<Predicted>(*this); }
  void truncate(size_t) override {}
  size_t num_unseen() const override { return num_open_; }
  size_t num_exact() const override { return num_open_; }
  void reserve(size_t, size_t) override {}
  size_t together(size_t, size_t count) const override { return count; }
  void begin(size_t, size_t) override {}
  void end(size_t, size_t) override {}
  bool has_predictor() const override { return true; }
  bool predicts(size_t position) const override { return position >= num_open_; }
  const uint64_t* candidates(size_t, size_t) const override { return nullptr; }
  uint64_t* active(size_t, size_t) override { return nullptr; }

 private:
  size_t num_open_;
};

}  // namespace relufy
