#include "decoder.h"

#include <algorithm>
#include <cmath>

namespace relufy {
namespace {

// The largest dimensions believed: the engine's own buffers grow with a width.
constexpr size_t kMostVocabulary = size_t{1} << 24, kMostWidth = size_t{1} << 19,
                 kMostContext = size_t{1} << 31;
constexpr size_t kMostHeadDim = 1024, kMostPartitions = 16, kMostRopes = 4;

// Reads what a file says of one layer.
class LayerReader {
 public:
  LayerReader(const PackedFile& file, const Decoder& decoder, size_t index)
      : file_(file), d_(decoder), prefix_("layers." + std::to_string(index) + ".") {}

  Layer read() const {
    size_t queries = d_.num_heads * d_.head_dim, keys = d_.num_kv_heads * d_.head_dim;
    Layer layer{};
    read_norms(layer, queries, keys);
    size_t window = file_.whole_or(prefix_ + "window", 0, 0, kMostContext);
    layer.window = window ? window : SIZE_MAX;
    size_t table = file_.whole_or(prefix_ + "rope", !d_.ropes.empty(), 0, d_.ropes.size());
    layer.rotary = table ? &d_.ropes[table - 1] : nullptr;
    layer.q = matrix("q", queries, d_.hidden_size);
    layer.k = matrix("k", keys, d_.hidden_size);
    layer.v = matrix("v", keys, d_.hidden_size);
    layer.o = matrix("o", d_.hidden_size, queries);
    read_mlp(layer);
    layer.k_shares_q = shares("k.shares_q", layer.k, layer.q);
    layer.v_shares_q = shares("v.shares_q", layer.v, layer.q);
    layer.up_shares_gate = layer.is_gated && shares("up.shares_gate", layer.up, layer.gate);
    return layer;
  }

 private:
  void read_norms(Layer& layer, size_t queries, size_t keys) const {
    bool each_head = d_.query_norm == QueryNorm::head;
    if (d_.has_input_norms) {
      layer.attention_norm = norm("attention_norm", d_.hidden_size);
      layer.mlp_norm = norm("mlp_norm", d_.hidden_size);
    }
    if (d_.has_output_norms) {
      layer.attention_output_norm = norm("attention_output_norm", d_.hidden_size);
      layer.mlp_output_norm = norm("mlp_output_norm", d_.hidden_size);
    }
    if (d_.query_norm == QueryNorm::none) return;
    layer.q_norm = norm("q_norm", each_head ? d_.head_dim : queries);
    layer.k_norm = norm("k_norm", each_head ? d_.head_dim : keys);
  }

  void read_mlp(Layer& layer) const {
    layer.is_gated = file_.whole(prefix_ + "gated", 0, 1) == 1;
    layer.has_bundle = file_.has_tensor(prefix_ + "up_down");
    if (layer.is_gated) layer.gate = matrix("gate", d_.intermediate_size, d_.hidden_size);
    if (layer.has_bundle) {
      if (!layer.is_gated) throw FileError("the packed file is damaged: a bundle without a gate");
      read_bundle(layer);
    } else {
      layer.up = matrix("up", d_.intermediate_size, d_.hidden_size);
      layer.down = matrix("down", d_.hidden_size, d_.intermediate_size);
    }
    layer.activation = static_cast<Activation>(file_.whole(prefix_ + "activation", 0, 5));
    layer.shift = static_cast<float>(file_.number_or(prefix_ + "shift", 0.0));
    layer.cutoff = static_cast<float>(file_.number_or(prefix_ + "cutoff", 0.0));
    layer.up_relu = flag("up_relu");
    layer.is_statistical = flag("statistical");
    layer.deviations = static_cast<float>(file_.number_or(prefix_ + "deviations", 0.0));
    layer.neuron = selection("neuron", d_.intermediate_size);
    if (file_.has_tensor(prefix_ + "predictor_in")) read_predictor(layer);
  }

  void read_predictor(Layer& layer) const {
    size_t rank = file_.rows_of(prefix_ + "predictor_in");
    if (rank == 0 || rank > d_.hidden_size || d_.neurons_per_partition % 64 != 0)
      throw FileError("the packed file is damaged: a predictor of rank " + std::to_string(rank));
    layer.predictor.inner = matrix("predictor_in", rank, d_.hidden_size);
    Tensor outer = file_.matrix(prefix_ + "predictor_out", d_.intermediate_size, rank);
    bool is_alike = is_integer(outer.stored.dtype) == is_integer(layer.predictor.inner.stored.dtype);
    if (outer.layout != Layout::rows || !is_alike)
      throw FileError("the packed file is damaged: a predictor is not stored by neuron, or in two ways");
    layer.predictor.outer = outer.stored;
    layer.predictor.thresholds = file_.vector(prefix_ + "predictor_threshold", d_.intermediate_size);
  }

  void read_bundle(Layer& layer) const {
    const Tensor& t = file_.tensor(prefix_ + "up_down", Layout::bundle, d_.intermediate_size, d_.hidden_size);
    layer.up = described("up", d_.intermediate_size, d_.hidden_size);
    layer.up.stored = file_.half(t, 0, prefix_ + "up.scales");
    layer.down = described("down", d_.hidden_size, d_.intermediate_size);
    layer.down.stored = file_.half(t, 1, prefix_ + "down.scales");
    layer.down.layout = Layout::columns;
    if (layer.up.rank || layer.down.rank)
      throw FileError("the packed file is damaged: a correction on a bundle of skipped neurons");
  }

  // All of a matrix but where it lies.
  Matrix described(const std::string& name, size_t outputs, size_t inputs) const {
    Matrix m;
    m.outputs = outputs;
    m.inputs = inputs;
    m.bias = file_.vector_or_null(prefix_ + name + ".bias", outputs);
    m.mask = selection(name, inputs);
    std::string in = prefix_ + name + ".low_rank_in", out = prefix_ + name + ".low_rank_out";
    if (!m.mask || !file_.has_tensor(in)) return m;
    m.rank = file_.rows_of(in);
    m.low_rank_in = float_rows(in, m.rank, inputs);
    m.low_rank_out = float_rows(out, outputs, m.rank);
    return m;
  }

  Matrix matrix(const std::string& name, size_t outputs, size_t inputs) const {
    Matrix m = described(name, outputs, inputs);
    Tensor t = file_.matrix(prefix_ + name, outputs, inputs);
    m.layout = t.layout;
    m.stored = t.stored;
    return m;
  }

  StoredRows float_rows(const std::string& name, size_t rows, size_t columns) const {
    const Tensor& t = file_.tensor(name, Layout::rows, rows, columns);
    if (is_integer(t.stored.dtype))
      throw FileError("the packed file is damaged: " + name + " is not of floats");
    return t.stored;
  }

  Selection selection(const std::string& site, size_t n) const {
    std::string name = prefix_ + site + ".";
    Selection s;
    s.kind = static_cast<Selection::Kind>(file_.whole_or(name + "select", 0, 0, 3));
    s.threshold = static_cast<float>(file_.number_or(name + "threshold", 0.0));
    s.k = file_.whole_or(name + "k", 0, 0, n);
    s.decode_only = flag(site + ".decode_only");
    s.dense_first = file_.whole_or(name + "dense_first", 0, 0, kMostContext);
    s.thresholds = file_.vector_or_null(name + "thresholds", n);
    s.weight = file_.vector_or_null(name + "weight", n);
    s.centre = file_.vector_or_null(name + "centre", n);
    return s;
  }

  // Whether a's input may be first's. A correction needs what its own mask left out, in a place of its own;
  // and columns need the list of their inputs, which is made for columns only.
  bool shares(const std::string& name, const Matrix& a, const Matrix& first) const {
    bool is_alone = a.rank > 0 || first.rank > 0 || (a.is_columns() && !first.is_columns());
    return !is_alone && (flag(name) || !(a.mask || first.mask));
  }

  Norm norm(const std::string& name, size_t n) const {
    const float* weight = file_.vector(prefix_ + name, n);
    return {weight, d_.has_layer_norm ? file_.vector(prefix_ + name + ".bias", n) : nullptr};
  }

  bool flag(const std::string& name) const { return file_.whole_or(prefix_ + name, 0, 0, 1) == 1; }

  const PackedFile& file_;
  const Decoder& d_;
  std::string prefix_;
};

Matrix whole_matrix(const PackedFile& file, const std::string& name, size_t outputs, size_t inputs) {
  Tensor t = file.matrix(name, outputs, inputs);
  if (t.layout != Layout::rows)
    throw FileError("the packed file is damaged: " + name + " is not stored by row");
  Matrix m;
  m.stored = t.stored;
  m.outputs = outputs;
  m.inputs = inputs;
  return m;
}

}  // namespace

// Neurons must be skippable at all, and each gate a row of its own, which is computed apart from the others.
const char* Layer::refuses_candidates() const {
  if (has_global_neurons()) return "which ones are active is decided among all of them";
  if (first().is_columns() || first().rank > 0)
    return "the gate is stored for inputs with zeros; pack the model for reuse";
  if (is_gated ? !has_bundle : !has_partial_down())
    return "no neurons are skipped; it takes a model whose neurons have zeros, packed for exact or reuse";
  return nullptr;
}

Decoder::Decoder(const PackedFile& file) {
  vocab_size = file.whole("vocab_size", 1, kMostVocabulary);
  hidden_size = file.whole("hidden_size", 1, kMostWidth);
  intermediate_size = file.whole("intermediate_size", 1, kMostWidth);
  num_layers = file.whole("num_layers", 1, 1 << 16);
  num_heads = file.whole("num_heads", 1, 1 << 16);
  num_kv_heads = file.whole("num_kv_heads", 1, num_heads);
  head_dim = file.whole("head_dim", 2, kMostHeadDim);
  max_context = file.whole("max_context", 1, kMostContext);
  neurons_per_partition = file.whole("neurons_per_partition", 16, kMostInputs);
  norm_eps = static_cast<float>(file.number("norm_eps"));
  has_layer_norm = file.whole("norm_kind", 0, 1) == 1;
  has_input_norms = file.whole_or("input_norms", 1, 0, 1) == 1;
  has_output_norms = file.whole_or("output_norms", 0, 0, 1) == 1;
  query_norm = static_cast<QueryNorm>(file.whole_or("query_norm", 0, 0, 2));
  is_parallel = file.whole_or("parallel", 0, 0, 1) == 1;
  positions = static_cast<Positions>(file.whole("position_kind", 0, 2));
  alibi_rounds = file.whole_or("alibi_rounds", 0, 0, 1) == 1;
  embedding_scale = static_cast<float>(file.number_or("embedding_scale", 1.0));
  attention_scale =
      static_cast<float>(file.number_or("attention_scale", 1.0 / std::sqrt(static_cast<double>(head_dim))));
  attention_softcap = static_cast<float>(file.number_or("attention_softcap", 0.0));
  final_softcap = static_cast<float>(file.number_or("final_softcap", 0.0));
  if (num_heads % num_kv_heads != 0 || head_dim % 2 != 0 || neurons_per_partition % 16 != 0 ||
      num_heads * head_dim > kMostWidth || num_partitions() > kMostPartitions)
    throw FileError("the packed file is damaged: its heads or partitions make no sense");
  embedding = whole_matrix(file, "embedding", vocab_size, hidden_size);
  head = file.has_tensor("head") ? whole_matrix(file, "head", vocab_size, hidden_size) : embedding;
  final_norm = {file.vector("final_norm", hidden_size),
                has_layer_norm ? file.vector("final_norm.bias", hidden_size) : nullptr};
  read_positions(file);
  for (size_t i = 0; i < num_layers; ++i) layers.push_back(LayerReader(file, *this, i).read());
  for (const Layer& layer : layers)
    for (const Matrix* m : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down})
      max_rank = std::max(max_rank, m->rank);
  predictor_dense_first = file.whole_or("predictor_dense_first", 0, 0, kMostContext);
  for (size_t i = num_layers; i-- > 0;) {
    if (!layers[i].predictor) continue;
    predictor_rank = std::max(predictor_rank, layers[i].predictor.inner.outputs);
    first_predicted = i;
  }
}

void Decoder::read_positions(const PackedFile& file) {
  if (positions == Positions::learned)
    position_embedding = whole_matrix(file, "position_embedding", max_context, hidden_size).stored;
  if (positions == Positions::alibi) alibi_slopes = file.vector("alibi_slopes", num_heads);
  size_t tables = file.whole_or("num_ropes", positions == Positions::rotary, 0, kMostRopes);
  for (size_t i = 0; i < tables; ++i) {
    std::string numbers = "ropes." + std::to_string(i) + ".";
    size_t dim = file.whole_or(numbers + "dim", head_dim, 2, head_dim);
    if (dim % 2 != 0) throw FileError("the packed file is damaged: it rotates half a pair");
    std::string tensor = i == 0 ? "rope_frequencies" : "rope_frequencies." + std::to_string(i);
    float scale = static_cast<float>(file.number_or(numbers + "scale", 1.0));
    ropes.push_back({file.vector(tensor, dim / 2), dim / 2, scale});
  }
}

}  // namespace relufy
