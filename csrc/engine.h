// Runs a packed model: tokens in, logits out, reading no weight that a zero makes unnecessary.
//
// The contract: a token's logits are the same bits whatever the number of threads, the tokens that share its
// step, the other sequences, and whether zeros are skipped (docs/format.md and kernels.h say how).
#pragma once

#include <cstdint>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "buffer.h"
#include "decoder.h"
#include "kernels.h"
#include "kv_cache.h"
#include "packed_file.h"
#include "thread_pool.h"

namespace relufy {

struct Options {
  size_t threads = 1;
  size_t context = 0;  // positions of the KV cache in all; 0 means the model's own context
  bool skip = true;    // false reads every weight: the same bits, for comparison
};

// Tokens that extend one sequence.
struct Work {
  SequenceId sequence;
  std::span<const int32_t> tokens;
};

enum class Logits { none, last, all };

// Sums since the last reset. What is used (not skipped) is counted for each token; bytes are counted for each
// read from memory, so a weight that several tokens of a step share counts once.
struct Stats {
  uint64_t tokens = 0;
  uint64_t weight_bytes = 0;  // with the lists of active inputs and neurons
  uint64_t kv_bytes = 0;
  std::vector<uint64_t> attention_inputs_used, mlp_inputs_used, neurons_used;  // by layer
};

class Engine {
 public:
  Engine(const std::string& path, Options options);

  const Decoder& decoder() const { return decoder_; }
  size_t threads() const { return pool_.size(); }
  size_t context() const { return context_; }
  const char* isa() const { return kernels_.name; }

  SequenceId new_sequence();
  SequenceId fork(SequenceId parent);
  void truncate(SequenceId id, size_t length);
  void free(SequenceId id);
  size_t length(SequenceId id);

  // How many rows of logits a step gives.
  static size_t num_logits(std::span<const Work> work, Logits wanted);

  // Extends the sequences and writes num_logits rows of vocab_size floats, in the order of the work.
  // Throws std::invalid_argument (a bad token, sequence or empty work) or OutOfKv before anything has
  // changed.
  void step(std::span<const Work> work, Logits wanted, float* logits);

  Stats stats();
  void reset_stats();

 private:
  static constexpr size_t kChunk = 32;  // tokens that go through the layers together

  struct Token {
    int32_t id;
    size_t position;
    const size_t* blocks;  // of its sequence
    bool wants_logits;
  };
  struct Projection {
    const Tensor* weight = nullptr;
    float* y = nullptr;
    size_t y_stride = 0;
    bool adds_to_hidden = false;  // then in rows, and y is projected_
  };
  struct Scratch {  // one for each thread
    Buffer<float> scores;
    Buffer<uint32_t> list;
    Buffer<const float*> blocks;
    std::vector<uint64_t> neurons_used;  // by layer
    uint64_t weight_bytes = 0, kv_bytes = 0;
  };

  void check(std::span<const Work> work) const;
  void reserve(std::span<const Work> work);
  void allocate();

  // Those with a team are called by every thread alike; the others are tasks, or parts of one.
  void forward(std::span<const Token> tokens, float* logits, Team& team);
  void embed(std::span<const Token> tokens, Team& team);
  size_t list_needed(bool has_zeros, const float* x, size_t x_stride, size_t tokens, size_t n, uint32_t* list,
                     uint64_t* used) const;
  void list_inputs(bool has_relu, size_t tokens, uint64_t* used);
  void normalise(const float* weight, bool has_relu, size_t tokens, uint64_t* used, Team& team);
  void project(std::span<const Projection> projections, const float* x, size_t x_stride, size_t tokens,
               Team& team);
  void project_part(const Projection& projection, size_t task, const float* x, size_t x_stride, size_t tokens,
                    Scratch& scratch);
  void attention(const Layer& layer, size_t index, std::span<const Token> tokens, Team& team);
  void attend_head(size_t layer, size_t kv_head, std::span<const Token> tokens, Scratch& scratch);
  void mlp(const Layer& layer, size_t index, size_t tokens, Team& team);
  void sparse_partition(const Layer& layer, size_t index, size_t partition, size_t tokens, Scratch& scratch);
  void dense_partition(const Layer& layer, size_t index, size_t partition, size_t tokens, Scratch& scratch);
  void head(std::span<const Token> tokens, float* logits, Team& team);
  void project_columns(const Layer& layer, size_t tokens, Team& team);
  void project_rows(const Tensor& w, size_t first, size_t neurons, size_t tokens, float* y, Scratch& scratch);

  PackedFile file_;
  Decoder decoder_;
  const Kernels& kernels_;
  size_t context_;
  bool skip_;
  KvCache kv_;
  ThreadPool pool_;
  std::mutex mutex_;

  size_t width_, query_width_, key_width_, neuron_width_;  // padded
  Buffer<float> hidden_, normed_, projected_;              // kChunk x width_
  Buffer<float> queries_, keys_, values_, attended_;
  Buffer<float> gates_, ups_;  // kChunk x neuron_width_; ups_ where neurons are dense
  Buffer<float> partials_;     // partitions x kChunk x width_: where they are sparse
  Buffer<float> cosines_, sines_;
  Buffer<uint32_t> inputs_, all_;  // the inputs that some token needs, and 0, 1, 2, ...
  size_t num_inputs_ = 0;
  std::vector<Scratch> scratch_;
  Stats stats_;
};

}  // namespace relufy
