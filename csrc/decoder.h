// The canonical decoder, as data: what a packed file says of a model, checked against itself.
//
// RMS or layer norm, rotary or learned positions, grouped-query attention, a gated or plain MLP, biases, a
// tied or untied head. What differs between layers (activation, masks, layouts) is in Layer.
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

struct Norm {
  const float *weight, *bias;  // bias: of a layer norm
};

// The sites, as stats count them.
enum Site : size_t { kQ, kK, kV, kO, kGate, kUp, kDown, kNeuron, kNumSites };
constexpr std::array<const char*, kNumSites> kSiteNames{"q", "k", "v", "o", "gate", "up", "down", "neuron"};

struct Layer {
  Norm attention_norm, mlp_norm;
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

  const Matrix& first() const { return is_gated ? gate : up; }  // whose outputs the activation reads
  bool has_global_neurons() const { return is_statistical || neuron.is_global(); }
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
  bool has_layer_norm, has_learned_positions;
  Matrix embedding, head;  // the head is the embedding itself where they are tied
  StoredRows position_embedding;
  Norm final_norm;
  const float* rope_frequencies = nullptr;  // head_dim / 2 of them, radians per position
  std::vector<Layer> layers;
  size_t max_rank = 0;

  size_t num_partitions() const {
    return (intermediate_size + neurons_per_partition - 1) / neurons_per_partition;
  }
};

}  // namespace relufy
