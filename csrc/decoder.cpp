#include "decoder.h"

namespace relufy {
namespace {

constexpr size_t kMost = size_t{1} << 24;  // the largest dimension believed
constexpr size_t kMostHeadDim = 1024;      // as wide as the scratch of the attention kernel

Layer read_layer(const PackedFile& file, const Decoder& d, size_t index) {
  std::string prefix = "layers." + std::to_string(index) + ".";
  size_t queries = d.num_heads * d.head_dim, keys = d.num_kv_heads * d.head_dim;
  auto matrix = [&](const char* name, size_t rows, size_t columns) {
    return &file.matrix(prefix + name, rows, columns);
  };
  auto norm = [&](const char* name) {
    return file.tensor(prefix + name, Layout::vector, 1, d.hidden_size).data;
  };

  Layer layer{};
  layer.attention_norm = norm("attention_norm");
  layer.mlp_norm = norm("mlp_norm");
  layer.q = matrix("q", queries, d.hidden_size);
  layer.k = matrix("k", keys, d.hidden_size);
  layer.v = matrix("v", keys, d.hidden_size);
  layer.o = &file.tensor(prefix + "o", Layout::rows, d.hidden_size, queries);
  layer.gate = matrix("gate", d.intermediate_size, d.hidden_size);
  if (file.has_tensor(prefix + "up_down")) {
    layer.up_down = &file.tensor(prefix + "up_down", Layout::bundle, d.intermediate_size, d.hidden_size);
  } else {
    layer.up = matrix("up", d.intermediate_size, d.hidden_size);
    layer.down = &file.tensor(prefix + "down", Layout::rows, d.hidden_size, d.intermediate_size);
  }
  layer.activation = static_cast<Activation>(file.whole(prefix + "activation", 0, 2));
  layer.shift = static_cast<float>(file.number(prefix + "shift"));
  layer.attention_input_relu = file.whole(prefix + "attention_input_relu", 0, 1) == 1;
  layer.mlp_input_relu = file.whole(prefix + "mlp_input_relu", 0, 1) == 1;
  return layer;
}

}  // namespace

Decoder::Decoder(const PackedFile& file) {
  vocab_size = file.whole("vocab_size", 1, kMost);
  hidden_size = file.whole("hidden_size", 1, kMost);
  intermediate_size = file.whole("intermediate_size", 1, kMost);
  num_layers = file.whole("num_layers", 1, 1 << 16);
  num_heads = file.whole("num_heads", 1, 1 << 16);
  num_kv_heads = file.whole("num_kv_heads", 1, num_heads);
  head_dim = file.whole("head_dim", 2, kMostHeadDim);
  max_context = file.whole("max_context", 1, size_t{1} << 31);
  neurons_per_partition = file.whole("neurons_per_partition", kPadding, kMost);
  norm_eps = static_cast<float>(file.number("norm_eps"));
  if (num_heads % num_kv_heads != 0 || head_dim % 2 != 0 || neurons_per_partition % kPadding != 0)
    throw FileError("the packed file is damaged: its head counts or partitions make no sense");
  embedding = &file.tensor("embedding", Layout::rows, vocab_size, hidden_size);
  head = file.has_tensor("head") ? &file.tensor("head", Layout::rows, vocab_size, hidden_size) : embedding;
  final_norm = file.tensor("final_norm", Layout::vector, 1, hidden_size).data;
  rope_frequencies = file.tensor("rope_frequencies", Layout::vector, 1, head_dim / 2).data;
  for (size_t i = 0; i < num_layers; ++i) layers.push_back(read_layer(file, *this, i));
}

}  // namespace relufy
