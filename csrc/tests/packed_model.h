// Packed files of tiny models with random weights, of every dtype and layout that docs/format.md knows.
#pragma once

#include <map>
#include <string>

#include "decoder.h"
#include "stored_matrix.h"

using Bytes = std::vector<uint8_t>;

template <class T>
void put(Bytes& bytes, size_t at, T value) {
  std::memcpy(&bytes[at], &value, sizeof value);
}

inline void put_name(Bytes& bytes, size_t at, const std::string& name) {
  std::memcpy(&bytes[at], name.data(), name.size());
}

// Makes the checksum of header and tables right, whatever they say.
inline void put_checksum(Bytes& bytes, size_t header_bytes) {
  put<uint32_t>(bytes, 12, 0);
  put<uint32_t>(bytes, 12, crc32(bytes.data(), std::min(header_bytes, bytes.size())));
}

struct TensorRecord {
  std::string name;
  Dtype dtype;
  Layout layout;
  uint64_t rows, columns, stride, offset, bytes;  // offset: in the file
};

// A packed file in the making.
class FileWriter {
 public:
  void number(const std::string& name, double value) { numbers_[name] = value; }

  void add(const std::string& name, Dtype dtype, Layout layout, size_t rows, size_t columns, size_t stride,
           const Bytes& content) {
    records_.push_back({name, dtype, layout, rows, columns, stride, payload_.size(), content.size()});
    payload_.insert(payload_.end(), content.begin(), content.end());
  }

  void vector(const std::string& name, std::vector<float> values) {
    size_t n = values.size();
    values.resize(padded(n));
    auto begin = reinterpret_cast<const uint8_t*>(values.data());
    Bytes content(begin, begin + values.size() * sizeof(float));
    add(name, Dtype::f32, Layout::vector, 1, n, content.size(), content);
  }

  Bytes bytes() {
    add("checksums", Dtype::bytes, Layout::raw, 1, 64, 64, Bytes(64));
    size_t header_bytes = 64 + 64 * numbers_.size() + 128 * records_.size();
    Bytes file(header_bytes);
    put_name(file, 0, "RELUFY\x1a\n");
    put<uint32_t>(file, 8, kFormatVersion);
    put<uint64_t>(file, 16, header_bytes);
    put<uint64_t>(file, 24, header_bytes + payload_.size());
    put<uint32_t>(file, 32, static_cast<uint32_t>(numbers_.size()));
    put<uint32_t>(file, 36, static_cast<uint32_t>(records_.size()));
    size_t at = 64;
    for (const auto& [name, value] : numbers_) {
      put_name(file, at, name);
      put(file, at + 56, value);
      at += 64;
    }
    for (const TensorRecord& r : records_) {
      put_name(file, at, r.name);
      put(file, at + 64, r.dtype);
      put(file, at + 68, r.layout);
      const uint64_t fields[] = {r.rows, r.columns, r.stride, header_bytes + r.offset, r.bytes};
      std::memcpy(&file[at + 72], fields, sizeof fields);
      at += 128;
    }
    put_checksum(file, header_bytes);
    file.insert(file.end(), payload_.begin(), payload_.end());
    return file;
  }

 private:
  std::map<std::string, double> numbers_;
  std::vector<TensorRecord> records_;
  Bytes payload_;
};

// A mask at a site; with per_channel, thresholds, weight and centre are vectors.
struct Mask {
  Selection::Kind kind = Selection::Kind::threshold;
  double threshold = 0.2;
  size_t k = 0;
  bool per_channel = false, decode_only = false;
  size_t dense_first = 0, rank = 0;
};

// Sizes are odd on purpose: none is a whole number of chunks, vectors or blocks.
struct TinyModel {
  std::string name;
  Dtype dtype = Dtype::f32;
  size_t vocab = 41, hidden = 20, neurons = 70, partition = 16, layers = 2;
  size_t heads = 4, kv_heads = 2, head_dim = 6, context = 70;
  bool gated = true, layer_norm = false, learned_positions = false, biases = false, own_head = false;
  bool for_dense = false, for_reuse = false, up_relu = false, statistical = false;
  Activation activation = Activation::relu;
  double shift = 0.0, cutoff = 0.0;
  std::map<std::string, Mask> masks = {};  // by site
  bool shares = false;                     // one mask for q, k and v, and one for gate and up
  bool input_norms = true, output_norms = false, parallel = false, alibi = false;
  QueryNorm query_norm = QueryNorm::none;
  size_t window = 0, tables = 1, rotary_dim = 0;  // 0: head_dim; tables are for the layers in turns
  double embedding_scale = 1.0, attention_softcap = 0.0, final_softcap = 0.0;
  size_t predictor_rank = 0;
};

class ModelWriter {
 public:
  explicit ModelWriter(const TinyModel& model) : m_(model) {}

  Bytes write() {
    const std::pair<const char*, double> numbers[] = {{"vocab_size", m_.vocab},
                                                      {"hidden_size", m_.hidden},
                                                      {"num_layers", m_.layers},
                                                      {"intermediate_size", m_.neurons},
                                                      {"num_heads", m_.heads},
                                                      {"num_kv_heads", m_.kv_heads},
                                                      {"head_dim", m_.head_dim},
                                                      {"neurons_per_partition", m_.partition},
                                                      {"max_context", m_.context},
                                                      {"norm_eps", 1e-5},
                                                      {"norm_kind", m_.layer_norm},
                                                      {"position_kind", m_.alibi ? 2 : m_.learned_positions},
                                                      {"input_norms", m_.input_norms},
                                                      {"output_norms", m_.output_norms},
                                                      {"query_norm", static_cast<double>(m_.query_norm)},
                                                      {"parallel", m_.parallel},
                                                      {"alibi_rounds", m_.alibi},
                                                      {"embedding_scale", m_.embedding_scale},
                                                      {"attention_softcap", m_.attention_softcap},
                                                      {"final_softcap", m_.final_softcap}};
    for (auto [name, value] : numbers) file_.number(name, value);
    Dtype table = m_.dtype == Dtype::int4 ? Dtype::int8 : m_.dtype;
    matrix("embedding", table, Layout::rows, m_.vocab, m_.hidden);
    if (m_.own_head) matrix("head", table, Layout::rows, m_.vocab, m_.hidden);
    write_positions();
    norm("final_norm");
    for (size_t i = 0; i < m_.layers; ++i) {
      std::string prefix = "layers." + std::to_string(i) + ".";
      if (m_.window) file_.number(prefix + "window", static_cast<double>(m_.window));
      if (m_.tables > 1) file_.number(prefix + "rope", static_cast<double>(i % (m_.tables + 1)));
      write_layer(prefix);
    }
    return file_.bytes();
  }

 private:
  void write_positions() {
    if (m_.learned_positions)
      return matrix("position_embedding", Dtype::f32, Layout::rows, m_.context, m_.hidden);
    if (m_.alibi) return file_.vector("alibi_slopes", random(m_.heads, 0.02f, 0.1));
    if (m_.tables > 1) file_.number("num_ropes", static_cast<double>(m_.tables));
    for (size_t table = 0; table < m_.tables; ++table) {
      std::string index = std::to_string(table);
      size_t dim = m_.rotary_dim ? m_.rotary_dim : m_.head_dim;
      std::vector<float> frequencies;
      for (size_t i = 0; i < dim / 2; ++i)
        frequencies.push_back(std::pow(0.3f, static_cast<float>(i + 2 * table)));
      file_.vector(table ? "rope_frequencies." + index : "rope_frequencies", frequencies);
      if (m_.tables == 1) continue;
      file_.number("ropes." + index + ".dim", static_cast<double>(dim));
      file_.number("ropes." + index + ".scale", 1.0 + 0.1 * static_cast<double>(table));
    }
  }

  void write_layer(const std::string& prefix) {
    const std::pair<const char*, double> numbers[] = {
        {"gated", m_.gated},       {"activation", static_cast<double>(m_.activation)},
        {"shift", m_.shift},       {"cutoff", m_.cutoff},
        {"up_relu", m_.up_relu},   {"statistical", m_.statistical},
        {"deviations", 0.3},       {"k.shares_q", m_.shares},
        {"v.shares_q", m_.shares}, {"up.shares_gate", m_.shares}};
    for (auto [name, value] : numbers) file_.number(prefix + name, value);
    size_t queries = m_.heads * m_.head_dim, keys = m_.kv_heads * m_.head_dim;
    for (const char* part : {"attention", "mlp"}) {
      if (m_.input_norms) norm(prefix + part + "_norm");
      if (m_.output_norms) norm(prefix + part + "_output_norm");
    }
    bool is_whole = m_.query_norm == QueryNorm::whole;
    if (m_.query_norm != QueryNorm::none) norm(prefix + "q_norm", is_whole ? queries : m_.head_dim);
    if (m_.query_norm != QueryNorm::none) norm(prefix + "k_norm", is_whole ? keys : m_.head_dim);
    projection(prefix, "q", queries, m_.hidden);
    projection(prefix, "k", keys, m_.hidden);
    projection(prefix, "v", keys, m_.hidden);
    projection(prefix, "o", m_.hidden, queries);
    if (m_.gated) projection(prefix, "gate", m_.neurons, m_.hidden);
    write_up_and_down(prefix);
    mask(prefix, "neuron", m_.neurons);
    if (m_.predictor_rank) write_predictor(prefix);
  }

  void write_predictor(const std::string& prefix) {
    Dtype dtype = m_.dtype == Dtype::int4 ? Dtype::int8 : m_.dtype;
    matrix(prefix + "predictor_in", dtype, Layout::rows, m_.predictor_rank, m_.hidden);
    matrix(prefix + "predictor_out", dtype, Layout::rows, m_.neurons, m_.predictor_rank);
    file_.vector(prefix + "predictor_threshold", random(m_.neurons));
  }

  void write_up_and_down(const std::string& prefix) {
    bool is_sparse = has_sparse_neurons() && !m_.for_dense;
    bool is_bundle = m_.gated && is_sparse && rank("up") == 0 && rank("down") == 0;
    bool down_in_columns = !m_.gated && is_sparse;
    if (is_bundle) bundle(prefix);
    projection(prefix, "up", m_.neurons, m_.hidden, !is_bundle);
    projection(prefix, "down", m_.hidden, m_.neurons, !is_bundle, down_in_columns);
  }

  bool has_sparse_neurons() const {
    bool has_zeros = m_.activation == Activation::relu || m_.activation == Activation::relu2 ||
                     m_.activation == Activation::fatrelu;
    return has_zeros || m_.up_relu || m_.statistical || m_.masks.count("neuron");
  }

  size_t rank(const std::string& site) const { return m_.masks.count(site) ? m_.masks.at(site).rank : 0; }

  // A matrix with what belongs to it; its weights unless a bundle has them.
  void projection(const std::string& prefix, const std::string& site, size_t outputs, size_t inputs,
                  bool has_weights = true, bool in_columns = false) {
    bool is_first = site == (m_.gated ? "gate" : "up");
    in_columns = !m_.for_dense && (in_columns || m_.masks.count(site)) && !(m_.for_reuse && is_first);
    if (has_weights)
      matrix(prefix + site, m_.dtype, in_columns ? Layout::columns : Layout::rows, outputs, inputs);
    if (m_.biases) file_.vector(prefix + site + ".bias", random(outputs));
    mask(prefix, site, inputs);
    Dtype dtype = m_.dtype == Dtype::f32 ? Dtype::f32 : Dtype::bf16;
    if (size_t r = rank(site)) {
      matrix(prefix + site + ".low_rank_in", dtype, Layout::rows, r, inputs);
      matrix(prefix + site + ".low_rank_out", dtype, Layout::rows, outputs, r);
    }
  }

  void mask(const std::string& prefix, const std::string& site, size_t n) {
    auto found = m_.masks.find(site);
    if (found == m_.masks.end()) return;
    const Mask& mask = found->second;
    std::string name = prefix + site + ".";
    file_.number(name + "select", static_cast<double>(mask.kind));
    file_.number(name + "threshold", mask.per_channel ? 0.0 : mask.threshold);
    file_.number(name + "k", static_cast<double>(mask.k));
    file_.number(name + "decode_only", mask.decode_only);
    file_.number(name + "dense_first", static_cast<double>(mask.dense_first));
    if (!mask.per_channel) return;
    file_.vector(name + "thresholds", random(n, 0.1f, mask.threshold));
    file_.vector(name + "weight", random(n, 0.1f, 1.0));
    if (site != "neuron") file_.vector(name + "centre", random(n, 0.05f));
  }

  // Small enough that no softmax is all one entry.
  void norm(const std::string& name, size_t n = 0) {
    file_.vector(name, random(n ? n : m_.hidden, 0.05f, 0.3));
    if (m_.layer_norm) file_.vector(name + ".bias", random(n ? n : m_.hidden));
  }

  std::vector<float> random(size_t n, float deviation = 0.1f, double mean = 0.0) {
    std::vector<float> values = random_floats(n, ++seed_);
    for (float& value : values) value = static_cast<float>(mean) + deviation * value;
    return values;
  }

  void matrix(const std::string& name, Dtype dtype, Layout layout, size_t rows, size_t columns) {
    bool is_columns = layout == Layout::columns;
    StoredMatrix stored(dtype, is_columns ? columns : rows, is_columns ? rows : columns, ++seed_);
    StoredRows view = stored.view();
    file_.add(name, dtype, layout, rows, columns, view.stride,
              Bytes(view.data, view.data + stored.rows * view.stride));
    if (is_integer(dtype)) file_.vector(name + ".scales", stored.scales);
  }

  void bundle(const std::string& prefix) {
    StoredMatrix up(m_.dtype, m_.neurons, m_.hidden, ++seed_), down(m_.dtype, m_.neurons, m_.hidden, ++seed_);
    size_t half = up.view().stride;
    Bytes content;
    for (size_t i = 0; i < m_.neurons; ++i)
      for (const StoredMatrix* m : {&up, &down})
        content.insert(content.end(), m->view().row(i), m->view().row(i) + half);
    file_.add(prefix + "up_down", m_.dtype, Layout::bundle, m_.neurons, m_.hidden, 2 * half, content);
    if (!is_integer(m_.dtype)) return;
    file_.vector(prefix + "up.scales", up.scales);
    file_.vector(prefix + "down.scales", down.scales);
  }

  const TinyModel& m_;
  FileWriter file_;
  uint32_t seed_ = 0;
};

inline Bytes packed(const TinyModel& model) { return ModelWriter(model).write(); }

// One model for each way through the engine.
inline std::vector<TinyModel> tiny_models(Dtype dtype) {
  using Kind = Selection::Kind;
  TinyModel bundle{.name = "bundle", .dtype = dtype};
  TinyModel wide{.name = "wide",
                 .dtype = dtype,
                 .vocab = 1100,
                 .hidden = 140,
                 .neurons = 1100,
                 .partition = 80,
                 .layers = 1,
                 .heads = 3,
                 .kv_heads = 1,
                 .head_dim = 40,
                 .own_head = true};
  for (const char* site : {"q", "k", "v", "gate", "up"}) wide.masks[site] = {};
  wide.shares = true;
  TinyModel inputs{.name = "inputs", .dtype = dtype, .biases = true, .activation = Activation::silu};
  inputs.masks = {{"q", {.per_channel = true}},
                  {"k", {.kind = Kind::topk, .k = 7}},
                  {"v", {.kind = Kind::relu}},
                  {"o", {.decode_only = true}},
                  {"gate", {.kind = Kind::topk, .k = 9, .per_channel = true}},
                  {"up", {.decode_only = true}},
                  {"down", {.threshold = 0.1, .dense_first = 3}}};
  TinyModel shared{.name = "shared", .dtype = dtype, .activation = Activation::fatrelu, .cutoff = 0.1};
  for (const char* site : {"q", "k", "v", "gate", "up"})
    shared.masks[site] = {.per_channel = true, .dense_first = 2};
  shared.masks["down"] = {.kind = Kind::topk, .k = 11};
  shared.shares = true;
  TinyModel plain{.name = "plain",
                  .dtype = dtype,
                  .gated = false,
                  .layer_norm = true,
                  .learned_positions = true,
                  .biases = true};
  TinyModel masked_plain = plain;
  masked_plain.name = "masked plain";
  masked_plain.activation = Activation::gelu;
  masked_plain.masks = {{"up", {.threshold = 0.1}}, {"neuron", {.kind = Kind::topk, .k = 20}}};
  TinyModel corrected{.name = "corrected", .dtype = dtype, .activation = Activation::gelu_tanh};
  corrected.masks = {
      {"q", {.rank = 3}}, {"o", {.rank = 17}}, {"up", {.rank = 2}}, {"down", {.threshold = 0.1, .rank = 5}}};
  TinyModel statistical{
      .name = "statistical", .dtype = dtype, .statistical = true, .activation = Activation::gelu_tanh};
  TinyModel drelu{.name = "drelu", .dtype = dtype, .up_relu = true, .shift = 0.1};
  drelu.masks = {{"neuron", {.threshold = 0.3, .per_channel = true, .decode_only = true}}};
  TinyModel dense = inputs;
  dense.name = "for dense";
  dense.for_dense = true;
  TinyModel local{.name = "local", .dtype = dtype, .layers = 4, .activation = Activation::gelu_tanh};
  local.output_norms = true;
  local.query_norm = QueryNorm::head;
  local.window = 5, local.tables = 2, local.rotary_dim = 4;
  local.embedding_scale = 4.5, local.attention_softcap = 2.0, local.final_softcap = 3.0;
  TinyModel for_reuse{.name = "for reuse", .dtype = dtype, .biases = true, .for_reuse = true};
  for (const char* site : {"q", "gate", "up"}) for_reuse.masks[site] = {.threshold = 0.1};
  TinyModel parallel = plain;
  parallel.name = "parallel";
  parallel.parallel = parallel.alibi = true;
  parallel.learned_positions = false;
  TinyModel post_norms{.name = "post norms", .dtype = dtype};
  post_norms.input_norms = false, post_norms.output_norms = true;
  post_norms.query_norm = QueryNorm::whole;
  post_norms.window = 34;
  TinyModel beside{.name = "beside", .dtype = dtype};
  beside.parallel = beside.output_norms = true;
  beside.masks = {{"q", {}}, {"o", {.rank = 3}}, {"up", {}}, {"down", {.rank = 2}}};
  // Matrices in columns whose input has no mask, beside others in rows: no packer writes that, and it runs.
  TinyModel first_in_columns{.name = "first in columns", .dtype = dtype, .activation = Activation::silu};
  for (const char* site : {"q", "gate"}) first_in_columns.masks[site] = {.kind = Kind::none};
  TinyModel others_in_columns{.name = "others in columns", .dtype = dtype, .activation = Activation::silu};
  for (const char* site : {"k", "v", "o", "up"}) others_in_columns.masks[site] = {.kind = Kind::none};
  TinyModel predicted{.name = "predicted", .dtype = dtype, .neurons = 150, .partition = 64};
  predicted.for_reuse = true;  // the gate in rows, beside the mask of its input
  predicted.masks["gate"] = {.threshold = 0.1};
  predicted.predictor_rank = 5;
  return {bundle,    wide,         inputs,           shared,
          plain,     masked_plain, corrected,        statistical,
          drelu,     dense,        first_in_columns, others_in_columns,
          local,     parallel,     post_norms,       beside,
          for_reuse, predicted};
}

// Sets $RELUFY_ISA to each instruction set in turn. Under sanitizers, which are slow, the kernels' own test
// does.
template <class Function>
void for_each_isa(Function&& function) {
#ifdef RELUFY_SANITIZED
  return function();
#endif
  for (const char* isa : {"portable", "avx2", "avx512", "neon"}) {
    if (!find_kernels(isa)) continue;
    setenv("RELUFY_ISA", isa, 1);
    function();
  }
  unsetenv("RELUFY_ISA");
}
