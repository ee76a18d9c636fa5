// The canonical decoder, as data: what a packed file says of a model, checked against itself.
//
// RMS or layer norms, before and after attention and MLP; rotary, learned or ALiBi positions; grouped-query
// attention over everything or a window; a gated or plain MLP, after attention or beside it; biases, a tied
// or untied head. What differs between layers (reach, activation, masks, layouts) is in Layer.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "kernels.h"
#include "packed_file.h"

namespace relufy {

// A mask on a vector: which entries are kept, less their centre; the others are zero.
struct Selection {
  enum class Kind : uint32_t { none = 0, relu = 1, threshold = 2, topk = 3 };

  Kind kind = Kind::none;
  float threshold = 0.0f;
  const float *thresholds = nullptr, *weight = nullptr, *centre = nullptr;  // per channel
  size_t k = 0;
  bool decode_only = false;
  size_t dense_first = 0;

  explicit operator bool() const { return kind != Kind::none; }
  bool is_global() const { return kind == Kind::topk; }  // needs the whole vector
};

struct Matrix {
  Layout layout = Layout::rows;
  StoredRows stored;
  size_t outputs = 0, inputs = 0;
  const float* bias = nullptr;
  Selection mask;   // on its input
  size_t rank = 0;  // of the correction: y += low_rank_out (low_rank_in (x - mask(x)))
  StoredRows low_rank_in, low_rank_out;

  bool is_columns() const { return layout == Layout::columns; }
  bool reads_integers() const { return is_integer(stored.dtype) && !is_columns(); }  // quantised inputs
};

// Names the neurons that may be active: where outer (inner x) is not below the threshold, for the masked
// input x of the MLP's first matrix.
struct NeuronPredictor {
  Matrix inner;
  StoredRows outer;
  const float* thresholds = nullptr;

  explicit operator bool() const { return thresholds != nullptr; }
};

// Without a weight there is no norm; the bias is a layer norm's.
struct Norm {
  const float *weight = nullptr, *bias = nullptr;

  explicit operator bool() const { return weight != nullptr; }
};

// A table of rotary positions, for the pairs (i, i + half) of a head's first 2 * half entries.
struct Rope {
  const float* frequencies;  // `half` of them, radians per position
  size_t half;
  float scale;  // of cosines and sines
};

enum class Positions : uint32_t { rotary = 0, learned = 1, alibi = 2 };

// Whether queries and keys are normalised: not, each head by itself, or all heads of a token together.
enum class QueryNorm : uint32_t { none = 0, head = 1, whole = 2 };

// The sites, as stats count them.
enum Site : size_t { kQ, kK, kV, kO, kGate, kUp, kDown, kNeuron, kNumSites };
constexpr std::array<const char*, kNumSites> kSiteNames{"q", "k", "v", "o", "gate", "up", "down", "neuron"};

struct Layer {
  Norm attention_norm, mlp_norm;                // of their inputs
  Norm attention_output_norm, mlp_output_norm;  // of what they add to the hidden state
  Norm q_norm, k_norm;
  size_t window;       // positions that a token attends to; SIZE_MAX is all of them
  const Rope* rotary;  // null where queries and keys stay as they are
  Matrix q, k, v, o;
  Matrix gate, up, down;                        // no gate in a plain MLP: the activation acts on up's output
  bool k_shares_q, v_shares_q, up_shares_gate;  // their masked inputs

  bool is_gated;
  bool has_bundle;  // up and down lie side by side, by neuron
  Activation activation;
  float shift, cutoff;
  bool up_relu;         // dReLU
  bool is_statistical;  // before the activation, relu(z - mean - deviations * std)
  float deviations;
  Selection neuron;
  NeuronPredictor predictor;

  const Matrix& first() const { return is_gated ? gate : up; }  // whose outputs the activation reads
  bool has_global_neurons() const { return is_statistical || neuron.is_global(); }
  const char* refuses_candidates() const;  // why a policy can't limit the neurons, or null if it can
  bool has_partial_down() const {
    return has_bundle || (down.is_columns() && down.rank == 0);
  }  // by partition
};

struct Decoder {
  explicit Decoder(const PackedFile& file);

  size_t vocab_size, hidden_size, intermediate_size;
  size_t num_layers, num_heads, num_kv_heads, head_dim;
  size_t max_context;
  size_t neurons_per_partition;  // the unit of work, and of summation, of the MLP
  float norm_eps;
  bool has_layer_norm, has_input_norms, has_output_norms;
  bool is_parallel;  // attention and MLP read the same hidden state
  QueryNorm query_norm;
  Positions positions;
  float embedding_scale, attention_scale;
  float attention_softcap, final_softcap;  // 0: none
  Matrix embedding, head;                  // the head is the embedding itself where they are tied
  StoredRows position_embedding;
  Norm final_norm;
  std::vector<Rope> ropes;
  const float* alibi_slopes = nullptr;  // by head
  bool alibi_rounds;                    // to bf16, and scales by attention_scale
  std::vector<Layer> layers;
  size_t max_rank = 0;
  size_t predictor_rank = 0;         // the greatest; 0 without a predictor
  size_t predictor_dense_first = 0;  // positions below it have all neurons
  size_t first_predicted = 0;        // the first layer with a predictor

  size_t num_partitions() const {
    return (intermediate_size + neurons_per_partition - 1) / neurons_per_partition;
  }

 private:
  void read_positions(const PackedFile& file);
};

}  // namespace relufy
