// Runs a packed model: tokens in, logits out, reading no weight that a zero makes unnecessary.
//
// The contract: a token's logits are the same bits whatever the number of threads, the tokens that share its
// step, the other sequences, and whether zeros are skipped (docs/format.md and kernels.h say how).
//
// buffers.cpp holds a step's memory, engine.cpp sequences and steps, decode.cpp the choice of tokens,
// forward.cpp a token's way through the layers, attention.cpp and mlp.cpp what a layer does, predict.cpp what
// its predictor does, projection.cpp the products of matrices. A sequence may have an active set policy
// (active_set.h), which limits the neurons that its tokens compute: the contract then holds for tokens of
// equal candidates.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "active_set.h"
#include "buffer.h"
#include "crossover.h"
#include "decoder.h"
#include "kernels.h"
#include "kv_cache.h"
#include "narrow.h"
#include "packed_file.h"
#include "sampling.h"
#include "selection.h"
#include "thread_pool.h"

namespace relufy {

struct Options {
  size_t threads = 1;
  size_t context = 0;  // positions of the KV cache in all; 0 means the model's own context
  bool skip = true;    // false reads every weight: the same bits, for comparison
  Dtype kv_dtype = Dtype::f32;
  Memory memory = Memory::map;
  bool locks_memory = false;  // keeps the file's pages in memory: they are never paged out
};

// Tokens that extend one sequence.
struct Work {
  SequenceId sequence;
  std::span<const int32_t> tokens;
};

enum class Logits { none, last, all };

// Entries that are not zero: of each token, and of the tokens that go through the layers together, for at
// least one of them.
struct Use {
  uint64_t by_token = 0, together = 0;

  Use& operator+=(const Use& other) {
    by_token += other.by_token;
    together += other.together;
    return *this;
  }
  Use operator-(const Use& other) const { return {by_token - other.by_token, together - other.together}; }
};

// Sums since the last reset. What is used (not skipped) is counted for each token; bytes are counted for each
// read from memory, so a weight that several tokens of a step share counts once.
struct Stats {
  uint64_t tokens = 0;        // that went through the layers
  uint64_t reused = 0;        // positions that sequences took from others' instead
  uint64_t weight_bytes = 0;  // with scales, and the lists of active inputs and neurons
  uint64_t kv_bytes = 0;
  std::array<std::vector<Use>, kNumSites> used;  // by site and layer
  uint64_t limited = 0;                          // tokens that computed candidates only; of these, by layer:
  std::vector<Use> candidates;
  std::vector<uint64_t> fired;  // candidates that were active
};

class Engine {
 public:
  // With another engine's threads, both take turns at them, and Options::threads counts for nothing.
  Engine(const std::string& path, Options options, std::shared_ptr<ThreadPool> threads = nullptr);

  const Decoder& decoder() const { return decoder_; }
  size_t threads() const { return pool_.size(); }
  const std::shared_ptr<ThreadPool>& thread_pool() const { return shared_pool_; }
  size_t context() const { return context_; }
  size_t free_positions();  // of the context, in whole blocks that no sequence holds
  const char* isa() const { return kernels_.name; }
  const PackedFile& file() const { return file_; }

  // Why a policy can't limit the neurons of this file's model, in a few words; or "" if it can.
  std::string refuses_candidates() const;

  // Why no predictor can name candidates, likewise.
  std::string refuses_prediction() const;

  // Throws std::invalid_argument if there is a policy, and the file refuses what it does.
  SequenceId new_sequence(size_t prompt_length = 0, std::unique_ptr<ActiveSetPolicy> policy = nullptr);

  SequenceId fork(SequenceId parent);

  // The same, with another policy, which is made of the parent's, null if it has none, and of its length.
  using PolicyMaker = std::function<std::unique_ptr<ActiveSetPolicy>(const ActiveSetPolicy*, size_t)>;
  SequenceId fork(SequenceId parent, const PolicyMaker& make);

  // Null where a sequence has none. Valid until the sequence changes.
  const ActiveSetPolicy* policy(SequenceId id);

  void truncate(SequenceId id, size_t length);
  void free(SequenceId id);
  size_t length(SequenceId id);
  size_t prompt_length(SequenceId id);
  std::vector<int32_t> tokens(SequenceId id);

  // Fills an empty sequence with as many of the first tokens as lie in full blocks of other sequences, past
  // or present; one token at least is left to step. Returns how many. Its logits are the same bits as
  // without.
  size_t reuse_prefix(SequenceId id, std::span<const int32_t> tokens);

  // How many rows of logits a step gives.
  static size_t num_logits(std::span<const Work> work, Logits wanted);

  // Extends the sequences and writes num_logits rows of vocab_size floats, in the order of the work.
  // Throws std::invalid_argument (a bad token, sequence or empty work) or OutOfKv before anything has
  // changed.
  void step(std::span<const Work> work, Logits wanted, float* logits);

  // Extends a sequence by tokens, chooses the next one, extends by that, and so on, until `count` are chosen
  // or one is among `stops`; returns them. The last one is not in the sequence yet. Throws as `step` and
  // `choose` do, and then the sequence is as before.
  std::vector<Choice> decode(SequenceId id, std::span<const int32_t> tokens, size_t count,
                             std::span<const int32_t> stops, const Sampling& sampling = {},
                             size_t num_logprobs = 0);

  // Chooses the token after a sequence, or after its first `length` tokens, from the row of logits that a
  // step gave there; and the distribution that it is drawn from, as vocab_size floats.
  Choice choose(SequenceId id, const float* logits, const Sampling& sampling = {}, size_t num_logprobs = 0,
                std::optional<size_t> length = {});
  void probabilities(SequenceId id, const float* logits, const Sampling& sampling,
                     std::optional<size_t> length, float* out);

  // Above this share of a matrix's rows, in a step of `tokens` tokens, all of them are read (crossover.h). It
  // changes speed, never bits.
  void set_crossover(Product product, Dtype dtype, size_t tokens, float share);

  Stats stats();
  void reset_stats();

 private:
  static constexpr size_t kMostTokens = 128;       // that go through the layers together
  static constexpr size_t kFewTokens = 16;         // that there is room for from the beginning
  static constexpr size_t kPanelTokens = 4;        // from which on tasks are panels of the blocked kernels
  static constexpr size_t kFirstPositions = 1024;  // that attention has scratch for from the beginning

  struct Token {
    int32_t id;
    Place place;
    const size_t* blocks;  // of its sequence
    bool wants_logits;
    ActiveSetPolicy* policy = nullptr;
  };

  // Input vectors of matrices, masked, as the kernels read them.
  struct Vectors {
    size_t width = 0;
    Buffer<float> x, residual;  // residual: what the mask took, where a correction reads it
    Buffer<int8_t> high, low;
    Buffer<int16_t> pairs, groups;
    Buffer<float> scale;
    Buffer<int64_t> sum;
    Buffer<float> tiles;    // of x, for many tokens
    Buffer<uint32_t> list;  // the inputs that some token needs
    size_t listed = 0;
    Buffer<float> low_rank;  // tokens x rank: what the correction's first factor made of the residual

    Input input() const {
      return {x.get(),      width,       high.get(), low.get(),  pairs.get(),
              groups.get(), scale.get(), sum.get(),  tiles.get()};
    }
  };

  struct Projection {
    const Matrix* matrix = nullptr;
    Vectors* x = nullptr;
    float* y = nullptr;
    size_t y_stride = 0;
    bool adds_to_hidden = false;  // then y is projected_
  };

  struct Scratch {  // one for each thread
    Buffer<float> scores;
    Buffer<float> head;  // a query or key, padded
    Buffer<uint32_t> list, neurons;
    Buffer<const uint8_t*> blocks;
    Buffer<uint8_t> products;  // of dot and scatter
    Buffer<float> correction;
    std::vector<uint32_t> keys;
    Buffer<uint64_t> active;  // a set of neurons
    std::array<std::vector<Use>, kNumSites> used;
    std::vector<Use> candidates;
    std::vector<uint64_t> fired;
    uint64_t weight_bytes = 0, kv_bytes = 0, limited = 0;
  };

  // The neurons of a partition.
  struct Part {
    size_t index, first, neurons, tokens;
    std::span<const Token> all;
    size_t listed = 0;  // active neurons, in the thread's scratch
  };

  void check(std::span<const Work> work) const;
  void check(std::span<const int32_t> tokens) const;
  void check_room(SequenceId id, size_t count) const;
  void reserve(std::span<const Work> work);
  void give_back(SequenceId id);
  void check_policy(const ActiveSetPolicy* policy) const;
  ActiveSetPolicy* find_policy(SequenceId id) const;
  void truncate_locked(SequenceId id, size_t length);
  std::span<const Token> passage(size_t start) const;
  template <class Call>
  void for_policies(std::span<const Token> tokens, Call&& call) const;
  void allocate();
  void make_scores(size_t positions);
  void make_room(size_t tokens);
  Vectors make_vectors(size_t width, size_t tokens) const;
  void step_locked(std::span<const Work> work, Logits wanted, float* logits);
  Past past(SequenceId id, std::optional<size_t> length) const;
  template <class Condition>
  bool has_matrix(Condition&& condition) const;

  // Those with a team are called by every thread alike; the others are tasks, or parts of one.
  void forward(std::span<const Token> tokens, float* logits, Team& team);
  void embed(std::span<const Token> tokens, Team& team);
  void normalise(const Norm& norm, const float* x, size_t n, float* y) const;
  void normalise_token(const Norm& norm, const float* x, float* y) const;
  void normalise_queries(const Layer& layer, size_t tokens, Team& team);
  void prepare_head(const Norm& norm, const Layer& layer, size_t t, float* head, Scratch& scratch) const;
  void add_normalised(const Norm& norm, size_t t);
  size_t norm_bytes(const Norm& norm) const { return norm ? width_ * sizeof(float) : 0; }
  const float* mlp_hidden(size_t t) const { return &(decoder_.is_parallel ? before_ : hidden_)[t * width_]; }
  void fill(Vectors& v, const Matrix& reader, Place place, size_t token, const float* x, Scratch& scratch,
            bool others_quantise = false);
  void quantise(Vectors& v, size_t token) const;
  // Ends the filling of vectors by many tokens: calls list() once, and makes the tiles that panels read.
  template <class List>
  void lay_out(std::span<Vectors* const> filled, size_t tokens, Team& team, List&& list) {
    size_t tiles = tokens < kFewestForTiles ? 0 : round_up_quotient(tokens, kTileTokens);
    team.for_each(1 + tiles * filled.size(), [&](size_t task) {
      if (task == 0)
        list();
      else
        make_tile(*filled[(task - 1) / tiles], (task - 1) % tiles, tokens);
    });
  }
  template <class List>
  void lay_out(Vectors& filled, size_t tokens, Team& team, List&& list) {
    Vectors* const one[] = {&filled};
    lay_out(one, tokens, team, list);
  }
  void make_tile(Vectors& v, size_t tile, size_t tokens) const;
  void list_inputs(Vectors& v, const Matrix& reader, size_t tokens, std::vector<Use>& used, size_t layer);
  size_t list_needed(Product product, Dtype dtype, const float* x, size_t x_stride, size_t tokens, size_t n,
                     uint32_t* list, Use& used) const;
  void project(std::span<const Projection> projections, size_t tokens, Team& team);
  void correct(std::span<const Projection> projections, size_t tokens, Team& team);
  size_t outputs_per_task(const Matrix& m, size_t tokens) const;
  void project_part(const Projection& projection, size_t task, size_t tokens, Scratch& scratch);
  void dot_rows(const Matrix& m, const Vectors& x, size_t first, size_t rows, size_t tokens, float* y,
                size_t y_stride, Scratch& scratch);
  void attention(const Layer& layer, size_t index, std::span<const Token> tokens, Team& team);
  void write_head(const Layer& layer, size_t index, size_t kv_head, std::span<const Token> tokens,
                  Scratch& scratch);
  void attend_head(const Layer& layer, size_t index, size_t kv_head, std::span<const Token> tokens,
                   size_t first_token, Scratch& scratch);
  void write_kv(size_t layer, size_t kv_head, const Token& token, size_t t);
  void head(std::span<const Token> tokens, float* logits, Team& team);

  void mlp(const Layer& layer, size_t index, std::span<const Token> tokens, Team& team);
  void mlp_inputs(const Layer& layer, size_t index, std::span<const Token> tokens, Team& team);
  void whole_neurons(const Layer& layer, const Token& token, size_t t, Scratch& scratch);
  Part part_of(size_t partition, std::span<const Token> tokens) const;
  void neuron_part(const Layer& layer, size_t index, const Part& part, const Part& waiting, Scratch& scratch);
  void first_rows(const Layer& layer, size_t index, const Part& part, const Part& waiting, Scratch& scratch);
  size_t list_candidates(const Matrix& first, size_t index, const Part& part, Scratch& scratch);
  bool predicts(const Layer& layer, const Token& token) const;
  bool predicts_any(const Layer& layer, std::span<const Token> tokens) const;
  void reduce_inputs(const Layer& layer, std::span<const Token> tokens, Team& team);
  void predict_part(const Layer& layer, const Part& part, Scratch& scratch);
  void collect_active(const Token& token, size_t index, size_t t, Scratch& scratch);
  void add_sums(std::span<const Token> tokens, size_t index, Team& team);
  void list_neurons(const Layer& layer, size_t index, Part& part, Scratch& scratch);
  void up_part(const Layer& layer, size_t index, const Part& part, Scratch& scratch);
  void down_part(const Layer& layer, size_t index, const Part& part, Scratch& scratch);

  PackedFile file_;
  Decoder decoder_;
  const Kernels& kernels_;
  size_t context_;
  bool skip_;
  KvCache kv_;
  std::map<SequenceId, std::unique_ptr<ActiveSetPolicy>> policies_;  // of those that have one
  std::shared_ptr<ThreadPool> shared_pool_;
  ThreadPool& pool_;
  std::mutex mutex_;

  size_t width_, query_width_, key_width_, neuron_width_;  // padded
  Buffer<float> hidden_, normed_, projected_;              // tokens x width_
  Buffer<float> queries_, keys_, values_, attended_;
  Buffer<float> gates_, ups_;      // tokens x neuron_width_
  Buffer<float> partials_;         // partitions x tokens x width_
  Buffer<float> before_;           // tokens x width_: hidden before attention, for an MLP beside it
  Buffer<float> cosines_, sines_;  // tokens x tables x head_dim / 2
  std::array<Vectors, 3> inputs_;  // of q, k, v; of gate, up; of o; of the head
  Vectors products_;               // of down, where it is stored by row
  Vectors reduced_;                // inputs of the predictor's outer matrix
  Buffer<uint64_t> predicted_;     // tokens x set_words(neuron_width_): candidates
  Buffer<uint32_t> all_;           // 0, 1, 2, ...
  std::array<const uint64_t*, kMostTokens> candidates_{};  // of the tokens, in the layer; null: all neurons
  std::vector<Token> tokens_;
  std::vector<float> logits_;
  Sampler sampler_;
  std::vector<Scratch> scratch_;
  size_t room_ = 0;             // tokens that the buffers have room for
  size_t score_positions_ = 0;  // that scratch has room for
  Crossover crossover_;
  Stats stats_;
};

}  // namespace relufy
