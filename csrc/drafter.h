// Who proposes tokens to a model that will verify them (speculator.h): another model, or the text itself.
#pragma once

#include <memory>
#include <vector>

#include "engine.h"

namespace relufy {

// Random numbers of speculative decoding, beside the plain ones, uniform(seed, position), with which the
// model itself chooses: hashes of the same seed and position, of streams of their own.
enum class Stream : uint64_t { draft = 0xD7AF7000u, accept = 0xACCE9700u };
double uniform(uint64_t seed, uint64_t position, Stream stream);

// What was written so far. `sequence`, of the model that verifies, holds all of it but the last token.
struct Text {
  std::span<const int32_t> tokens;
  size_t prompt_length = 0;
  SequenceId sequence = 0;
};

// Tokens that may follow a text. `rows` has the distribution that each was drawn from, as row_size floats; it
// is empty where nothing was drawn: the tokens are then what greedy decoding gives, or were found.
struct Proposal {
  std::vector<int32_t> tokens;
  std::vector<float> rows;
  size_t row_size = 0;

  void clear() {
    tokens.clear();
    rows.clear();
  }
};

class Drafter {
 public:
  virtual ~Drafter() = default;

  // Gets ready for proposals after a text.
  virtual void read(const Text& text) = 0;

  // Proposes at most `most` tokens to follow the text. What is proposed for a place, and whether anything is,
  // depends on what precedes it and on its own random numbers alone.
  virtual void propose(const Text& text, size_t most, const Sampling& sampling, Proposal& proposal) = 0;

  // Who reads weights for it, or nullptr.
  virtual Engine* engine() const { return nullptr; }
};

// Proposes what followed the longest earlier match of the text's end, the latest of equally long ones; from
// the text's end on, what was proposed (Saxena 2023, Prompt Lookup Decoding).
class LookupDrafter : public Drafter {
 public:
  explicit LookupDrafter(size_t least_match) : least_match_(least_match) {}

  void read(const Text&) override {}
  void propose(const Text& text, size_t most, const Sampling& sampling, Proposal& proposal) override;

 private:
  static constexpr size_t kMostMatch = 32;  // tokens: longer matches count as equal
  size_t least_match_;
};

// Chooses the tokens of a model that drafts, as the request says, penalties and all; and stops where its
// likeliest token has less than `least_probability`: in its own distribution where it takes the likeliest
// token, else in the one that it draws from. Tokens from `vocab_size` on are never chosen.
class DraftSampler {
 public:
  DraftSampler(size_t vocab_size, double least_probability)
      : vocab_size_(vocab_size), least_probability_(least_probability), sampler_(vocab_size) {}

  size_t vocab_size() const { return vocab_size_; }

  void begin(const Sampling& sampling, Proposal& proposal);

  // Proposes one more token, from the logits after the past, or returns false.
  bool choose(const float* logits, const Past& past, Proposal& proposal);

 private:
  size_t vocab_size_;
  double least_probability_;
  Sampling sampling_;
  Sampler sampler_;
};

// Another model of the same vocabulary.
class ModelDrafter : public Drafter {
 public:
  // `vocab_size` is that of the model that verifies; tokens beyond it are never proposed.
  ModelDrafter(Engine& engine, size_t vocab_size, double least_probability);
  ~ModelDrafter() override;
  ModelDrafter(const ModelDrafter&) = delete;
  ModelDrafter& operator=(const ModelDrafter&) = delete;

  void read(const Text& text) override;
  void propose(const Text& text, size_t most, const Sampling& sampling, Proposal& proposal) override;
  Engine* engine() const override { return &engine_; }

 private:
  bool knows(std::span<const int32_t> tokens) const;
  size_t go_back_to(const Text& text);
  void step(std::span<const int32_t> tokens, Logits wanted);

  Engine& engine_;
  std::optional<SequenceId> sequence_;
  std::vector<int32_t> known_;  // the sequence's tokens
  size_t prompt_length_ = 0;
  std::vector<float> logits_;
  DraftSampler sampler_;
};

// The model itself, limited to the neurons that the last `window` tokens had active: on a fork of the
// sequence, which must keep track of these (a Reuse of period 1 does).
class SelfDrafter : public Drafter {
 public:
  SelfDrafter(Engine& engine, size_t window, double least_probability);

  void read(const Text&) override {}
  void propose(const Text& text, size_t most, const Sampling& sampling, Proposal& proposal) override;
  Engine* engine() const override { return &engine_; }

 private:
  Engine& engine_;
  size_t window_;
  std::vector<int32_t> tokens_;
  std::vector<float> logits_;
  DraftSampler sampler_;
};

}  // namespace relufy
