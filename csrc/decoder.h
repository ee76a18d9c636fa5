// The canonical decoder, as data: what a packed file says of a model, checked against itself.
//
// RMSNorm, rotary positions, grouped-query attention, a gated MLP, a tied or untied head. What differs
// between layers (activation, sparsifiers, layouts) is in Layer.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "packed_file.h"

namespace relufy {

struct Layer {
  const float* attention_norm;
  const float* mlp_norm;
  const Tensor *q, *k, *v, *o, *gate;
  const Tensor* up_down;    // a bundle where the neuron site is sparse, else null, and then:
  const Tensor *up, *down;  // rows
  Activation activation;
  float shift;
  bool attention_input_relu;  // ReLU on the shared input of q, k and v
  bool mlp_input_relu;        // ReLU on the shared input of gate and up

  bool has_sparse_neurons() const { return up_down != nullptr; }
};

struct Decoder {
  explicit Decoder(const PackedFile& file);

  size_t vocab_size, hidden_size, intermediate_size;
  size_t num_layers, num_heads, num_kv_heads, head_dim;
  size_t max_context;
  size_t neurons_per_partition;  // the unit of work, and of summation, of the MLP
  float norm_eps;
  const Tensor* embedding;
  const Tensor* head;  // the embedding itself where they are tied
  const float* final_norm;
  const float* rope_frequencies;  // head_dim / 2 of them, radians per position
  std::vector<Layer> layers;

  size_t num_partitions() const {
    return (intermediate_size + neurons_per_partition - 1) / neurons_per_partition;
  }
};

}  // namespace relufy
