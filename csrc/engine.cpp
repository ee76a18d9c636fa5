#include "engine.h"

#include <algorithm>
#include <cmath>

namespace relufy {
namespace {

constexpr size_t kTaskFloats = 16384;  // weights in a task of rows: 64 KiB
constexpr size_t kTaskColumns = 512;  // the least outputs in a task of columns: short runs of memory are slow

size_t round_up_quotient(size_t a, size_t b) { return (a + b - 1) / b; }

// How many outputs a task takes on: of rows, few, so that nobody waits long; of columns, as many as the
// threads allow, so that each stored row is read in long runs. Neither changes a bit of the result.
size_t outputs_per_task(const Tensor& w, size_t threads) {
  if (w.layout == Layout::rows) return std::max(kPadding, kTaskFloats / w.stride / kPadding * kPadding);
  size_t tasks = std::clamp<size_t>(w.stride / kTaskColumns, 1, threads);
  return padded(round_up_quotient(w.stride, tasks));
}

}  // namespace

Engine::Engine(const std::string& path, Options options)
    : file_(path),
      decoder_(file_),
      kernels_(kernels()),
      context_(options.context ? options.context : decoder_.max_context),
      skip_(options.skip),
      kv_(decoder_.num_layers, decoder_.num_kv_heads, decoder_.head_dim, context_),
      pool_(std::max<size_t>(1, options.threads)) {
  allocate();
}

void Engine::allocate() {
  const Decoder& d = decoder_;
  width_ = padded(d.hidden_size);
  query_width_ = padded(d.num_heads * d.head_dim);
  key_width_ = padded(d.num_kv_heads * d.head_dim);
  neuron_width_ = padded(d.intermediate_size);
  hidden_ = make_buffer<float>(kChunk * width_);
  normed_ = make_buffer<float>(kChunk * width_);
  projected_ = make_buffer<float>(kChunk * width_);
  queries_ = make_buffer<float>(kChunk * query_width_);
  keys_ = make_buffer<float>(kChunk * key_width_);
  values_ = make_buffer<float>(kChunk * key_width_);
  attended_ = make_buffer<float>(kChunk * query_width_);
  gates_ = make_buffer<float>(kChunk * neuron_width_);
  auto is_sparse = [](const Layer& layer) { return layer.has_sparse_neurons(); };
  if (std::any_of(d.layers.begin(), d.layers.end(), is_sparse))
    partials_ = make_buffer<float>(d.num_partitions() * kChunk * width_);
  if (!std::all_of(d.layers.begin(), d.layers.end(), is_sparse))
    ups_ = make_buffer<float>(kChunk * neuron_width_);
  cosines_ = make_buffer<float>(kChunk * d.head_dim / 2);
  sines_ = make_buffer<float>(kChunk * d.head_dim / 2);
  inputs_ = make_buffer<uint32_t>(width_ + 1);
  all_ = make_buffer<uint32_t>(std::max(width_, d.neurons_per_partition));
  for (size_t i = 0; i < std::max(width_, d.neurons_per_partition); ++i) all_[i] = static_cast<uint32_t>(i);

  size_t num_blocks = (std::min(context_, d.max_context) + kKvBlock - 1) / kKvBlock;
  for (size_t i = 0; i < pool_.size(); ++i) {
    Scratch scratch;
    scratch.scores = make_buffer<float>(num_blocks * kKvBlock);
    scratch.list = make_buffer<uint32_t>(d.neurons_per_partition + 1);
    scratch.blocks = make_buffer<const float*>(num_blocks);
    scratch.neurons_used.resize(d.num_layers);
    scratch_.push_back(std::move(scratch));
  }
  reset_stats();
}

SequenceId Engine::new_sequence() {
  std::lock_guard lock(mutex_);
  return kv_.create();
}

SequenceId Engine::fork(SequenceId parent) {
  std::lock_guard lock(mutex_);
  return kv_.fork(parent);
}

void Engine::truncate(SequenceId id, size_t length) {
  std::lock_guard lock(mutex_);
  kv_.truncate(id, length);
}

void Engine::free(SequenceId id) {
  std::lock_guard lock(mutex_);
  kv_.release(id);
}

size_t Engine::length(SequenceId id) {
  std::lock_guard lock(mutex_);
  return kv_.length(id);
}

Stats Engine::stats() {
  std::lock_guard lock(mutex_);
  Stats total = stats_;
  for (const Scratch& scratch : scratch_) {
    total.weight_bytes += scratch.weight_bytes;
    total.kv_bytes += scratch.kv_bytes;
    for (size_t i = 0; i < decoder_.num_layers; ++i) total.neurons_used[i] += scratch.neurons_used[i];
  }
  return total;
}

void Engine::reset_stats() {
  std::lock_guard lock(mutex_);
  size_t layers = decoder_.num_layers;
  stats_ = Stats{};
  stats_.attention_inputs_used.resize(layers);
  stats_.mlp_inputs_used.resize(layers);
  stats_.neurons_used.resize(layers);
  for (Scratch& scratch : scratch_) {
    scratch.weight_bytes = scratch.kv_bytes = 0;
    std::fill(scratch.neurons_used.begin(), scratch.neurons_used.end(), 0);
  }
}

size_t Engine::num_logits(std::span<const Work> work, Logits wanted) {
  if (wanted == Logits::none) return 0;
  if (wanted == Logits::last) return work.size();
  size_t count = 0;
  for (const Work& item : work) count += item.tokens.size();
  return count;
}

void Engine::check(std::span<const Work> work) const {
  for (size_t i = 0; i < work.size(); ++i) {
    if (work[i].tokens.empty())
      throw std::invalid_argument("a step needs at least one token for each sequence");
    for (size_t j = 0; j < i; ++j)
      if (work[j].sequence == work[i].sequence)
        throw std::invalid_argument("a step names a sequence twice; give its tokens together");
    for (int32_t token : work[i].tokens)
      if (token < 0 || static_cast<size_t>(token) >= decoder_.vocab_size)
        throw std::invalid_argument("token " + std::to_string(token) + " is not in the vocabulary of " +
                                    std::to_string(decoder_.vocab_size));
    size_t end = kv_.length(work[i].sequence) + work[i].tokens.size();
    if (end > decoder_.max_context)
      throw OutOfKv("the model's context has " + std::to_string(decoder_.max_context) + " positions, not " +
                    std::to_string(end));
  }
}

void Engine::reserve(std::span<const Work> work) {
  try {
    for (const Work& item : work) kv_.reserve(item.sequence, item.tokens.size());
  } catch (...) {
    for (const Work& item : work) kv_.truncate(item.sequence, kv_.length(item.sequence));
    throw;
  }
}

void Engine::step(std::span<const Work> work, Logits wanted, float* logits) {
  std::lock_guard lock(mutex_);
  check(work);
  reserve(work);
  std::vector<Token> tokens;
  for (const Work& item : work) {
    size_t start = kv_.length(item.sequence);
    for (size_t i = 0; i < item.tokens.size(); ++i) {
      bool is_last = i + 1 == item.tokens.size();
      bool wants = wanted == Logits::all || (wanted == Logits::last && is_last);
      tokens.push_back({item.tokens[i], start + i, kv_.blocks(item.sequence), wants});
    }
  }
  for (size_t start = 0; start < tokens.size(); start += kChunk) {
    auto chunk = std::span(tokens).subspan(start, std::min(kChunk, tokens.size() - start));
    pool_.run([&](Team& team) { forward(chunk, logits, team); });
    if (logits)
      for (const Token& token : chunk) logits += token.wants_logits * decoder_.vocab_size;
  }
  for (const Work& item : work) kv_.advance(item.sequence, item.tokens.size());
  stats_.tokens += tokens.size();
}

void Engine::forward(std::span<const Token> tokens, float* logits, Team& team) {
  embed(tokens, team);
  for (size_t i = 0; i < decoder_.num_layers; ++i) {
    const Layer& layer = decoder_.layers[i];
    normalise(layer.attention_norm, layer.attention_input_relu, tokens.size(),
              &stats_.attention_inputs_used[i], team);
    attention(layer, i, tokens, team);
    normalise(layer.mlp_norm, layer.mlp_input_relu, tokens.size(), &stats_.mlp_inputs_used[i], team);
    mlp(layer, i, tokens.size(), team);
  }
  head(tokens, logits, team);
}

void Engine::embed(std::span<const Token> tokens, Team& team) {
  size_t half = decoder_.head_dim / 2;
  team.for_each(tokens.size(), [&](size_t t) {
    const float* row = decoder_.embedding->data + tokens[t].id * decoder_.embedding->stride;
    std::copy_n(row, width_, &hidden_[t * width_]);
    for (size_t i = 0; i < half; ++i) {
      float angle = static_cast<float>(tokens[t].position) * decoder_.rope_frequencies[i];
      cosines_[t * half + i] = static_cast<float>(std::cos(static_cast<double>(angle)));
      sines_[t * half + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
    if (t == 0) stats_.weight_bytes += tokens.size() * width_ * sizeof(float);
  });
}

// Lists the i < n that some token needs: those with a nonzero x[t][i] if zeros may be skipped, else all.
size_t Engine::list_needed(bool has_zeros, const float* x, size_t x_stride, size_t tokens, size_t n,
                           uint32_t* list, uint64_t* used) const {
  if (has_zeros && skip_) return kernels_.list_active(x, x_stride, tokens, n, list, used);
  std::copy_n(all_.get(), n, list);
  *used += tokens * n;
  return n;
}

// normed <- norm(hidden), its negative entries zero if `has_relu`, and the list of the inputs that are left.
void Engine::normalise(const float* weight, bool has_relu, size_t tokens, uint64_t* used, Team& team) {
  team.for_each(tokens, [&](size_t t) {
    float* y = &normed_[t * width_];
    kernels_.rms_norm(&hidden_[t * width_], weight, decoder_.norm_eps, decoder_.hidden_size, y);
    if (has_relu) kernels_.activate(Activation::relu, 0.0f, y, width_);
    if (tokens == 1) list_inputs(has_relu, tokens, used);
  });
  if (tokens > 1) team.for_each(1, [&](size_t) { list_inputs(has_relu, tokens, used); });
}

void Engine::list_inputs(bool has_relu, size_t tokens, uint64_t* used) {
  num_inputs_ =
      list_needed(has_relu, normed_.get(), width_, tokens, decoder_.hidden_size, inputs_.get(), used);
  stats_.weight_bytes += width_ * sizeof(float);  // of the norm
  if (has_relu) stats_.weight_bytes += num_inputs_ * sizeof(uint32_t);
}

// y <- x W^T for several matrices that share x, in one round of tasks; then hidden += y where that is asked
// for.
void Engine::project(std::span<const Projection> projections, const float* x, size_t x_stride, size_t tokens,
                     Team& team) {
  auto num_tasks = [&](const Tensor& w) {
    return round_up_quotient(w.rows, outputs_per_task(w, pool_.size()));
  };
  size_t total = 0;
  for (const Projection& p : projections) total += num_tasks(*p.weight);
  team.for_each(total, [&](size_t task) {
    const Projection* p = projections.data();
    for (; task >= num_tasks(*p->weight); ++p) task -= num_tasks(*p->weight);
    project_part(*p, task, x, x_stride, tokens, scratch_[team.thread()]);
  });
}

void Engine::project_part(const Projection& projection, size_t task, const float* x, size_t x_stride,
                          size_t tokens, Scratch& scratch) {
  const Tensor& w = *projection.weight;
  size_t size = outputs_per_task(w, pool_.size()), first = task * size;
  float* y = projection.y + first;
  if (w.layout == Layout::columns) {
    size_t width = std::min(size, w.stride - first);
    kernels_.sum_columns(w.data + first, w.stride, width, inputs_.get(), num_inputs_, x, x_stride, tokens, y,
                         projection.y_stride);
    scratch.weight_bytes += num_inputs_ * width * sizeof(float);
    return;
  }
  size_t rows = std::min(size, w.rows - first);
  kernels_.dot_rows(w.data + first * w.stride, w.stride, rows, x, x_stride, tokens, y, projection.y_stride);
  scratch.weight_bytes += rows * w.stride * sizeof(float);
  if (!projection.adds_to_hidden) return;
  for (size_t t = 0; t < tokens; ++t)
    kernels_.add(y + t * projection.y_stride, &hidden_[t * width_ + first], padded(rows));
}

void Engine::attention(const Layer& layer, size_t index, std::span<const Token> tokens, Team& team) {
  const Projection projections[] = {{layer.q, queries_.get(), query_width_},
                                    {layer.k, keys_.get(), key_width_},
                                    {layer.v, values_.get(), key_width_}};
  project(projections, normed_.get(), width_, tokens.size(), team);
  team.for_each(decoder_.num_kv_heads,
                [&](size_t head) { attend_head(index, head, tokens, scratch_[team.thread()]); });
  const Projection output{layer.o, projected_.get(), width_, true};
  project({&output, 1}, attended_.get(), query_width_, tokens.size(), team);
}

// One KV head and the query heads that share it: writes the new positions, then attends from each.
void Engine::attend_head(size_t layer, size_t kv_head, std::span<const Token> tokens, Scratch& scratch) {
  size_t head_dim = decoder_.head_dim, half = head_dim / 2, value_width = padded(head_dim);
  size_t group = decoder_.num_heads / decoder_.num_kv_heads;
  for (size_t t = 0; t < tokens.size(); ++t) {
    size_t slot = tokens[t].position % kKvBlock;
    float* part = kv_.part(tokens[t].blocks[tokens[t].position / kKvBlock], layer, kv_head);
    float* key = &keys_[t * key_width_ + kv_head * head_dim];
    kernels_.rotate(&cosines_[t * half], &sines_[t * half], head_dim, key);
    for (size_t i = 0; i < head_dim; ++i) part[i * kKvBlock + slot] = key[i];
    const float* value = &values_[t * key_width_ + kv_head * head_dim];
    std::copy_n(value, head_dim, part + head_dim * kKvBlock + slot * value_width);
  }
  float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  for (size_t t = 0; t < tokens.size(); ++t) {
    size_t length = tokens[t].position + 1, num_blocks = (length + kKvBlock - 1) / kKvBlock;
    for (size_t b = 0; b < num_blocks; ++b) scratch.blocks[b] = kv_.part(tokens[t].blocks[b], layer, kv_head);
    for (size_t q = kv_head * group; q < (kv_head + 1) * group; ++q) {
      float* query = &queries_[t * query_width_ + q * head_dim];
      kernels_.rotate(&cosines_[t * half], &sines_[t * half], head_dim, query);
      kernels_.attend(query, scratch.blocks.get(), length, head_dim, scale, scratch.scores.get(),
                      &attended_[t * query_width_ + q * head_dim]);
    }
    scratch.kv_bytes += (num_blocks * kKvBlock * head_dim + length * value_width) * sizeof(float);
  }
}

void Engine::mlp(const Layer& layer, size_t index, size_t tokens, Team& team) {
  project_columns(layer, tokens, team);
  if (!layer.has_sparse_neurons()) {
    team.for_each(decoder_.num_partitions(),
                  [&](size_t p) { dense_partition(layer, index, p, tokens, scratch_[team.thread()]); });
    const Projection down{layer.down, projected_.get(), width_, true};
    project({&down, 1}, gates_.get(), neuron_width_, tokens, team);
    return;
  }
  team.for_each(decoder_.num_partitions(),
                [&](size_t p) { sparse_partition(layer, index, p, tokens, scratch_[team.thread()]); });
  team.for_each(tokens, [&](size_t t) {
    kernels_.add_partials(&partials_[t * width_], kChunk * width_, decoder_.num_partitions(), width_,
                          &hidden_[t * width_]);
  });
}

// Gate, and up where it stands alone, for all neurons at once: those that are stored by column.
void Engine::project_columns(const Layer& layer, size_t tokens, Team& team) {
  Projection projections[2];
  size_t count = 0;
  if (layer.gate->layout == Layout::columns) projections[count++] = {layer.gate, gates_.get(), neuron_width_};
  if (layer.up && layer.up->layout == Layout::columns)
    projections[count++] = {layer.up, ups_.get(), neuron_width_};
  if (count > 0) project({projections, count}, normed_.get(), width_, tokens, team);
}

// The same for one partition: those that are stored by row.
void Engine::project_rows(const Tensor& w, size_t first, size_t neurons, size_t tokens, float* y,
                          Scratch& scratch) {
  if (w.layout == Layout::columns) return;
  kernels_.dot_rows(w.data + first * w.stride, w.stride, neurons, normed_.get(), width_, tokens, y + first,
                    neuron_width_);
  scratch.weight_bytes += neurons * w.stride * sizeof(float);
}

// gate -> activation -> list of active neurons -> their rows of up and columns of down, without leaving the
// partition.
void Engine::sparse_partition(const Layer& layer, size_t index, size_t partition, size_t tokens,
                              Scratch& scratch) {
  size_t first = partition * decoder_.neurons_per_partition;
  size_t neurons = std::min(decoder_.neurons_per_partition, decoder_.intermediate_size - first);
  float* gate = &gates_[first];
  project_rows(*layer.gate, first, neurons, tokens, gates_.get(), scratch);
  for (size_t t = 0; t < tokens; ++t)
    kernels_.activate(layer.activation, layer.shift, gate + t * neuron_width_, padded(neurons));
  size_t listed = list_needed(true, gate, neuron_width_, tokens, neurons, scratch.list.get(),
                              &scratch.neurons_used[index]);
  float* sum = &partials_[partition * kChunk * width_];
  std::fill_n(sum, tokens * width_, 0.0f);
  const Tensor& bundle = *layer.up_down;
  kernels_.neurons(bundle.data + first * 2 * bundle.stride, bundle.stride, scratch.list.get(), listed, gate,
                   neuron_width_, normed_.get(), width_, tokens, !skip_, sum, width_);
  scratch.weight_bytes += listed * (2 * bundle.stride * sizeof(float) + sizeof(uint32_t));
}

// gate <- activation(gate) * up, for the neurons of a partition.
void Engine::dense_partition(const Layer& layer, size_t index, size_t partition, size_t tokens,
                             Scratch& scratch) {
  size_t first = partition * decoder_.neurons_per_partition;
  size_t neurons = std::min(decoder_.neurons_per_partition, decoder_.intermediate_size - first);
  project_rows(*layer.gate, first, neurons, tokens, gates_.get(), scratch);
  project_rows(*layer.up, first, neurons, tokens, ups_.get(), scratch);
  for (size_t t = 0; t < tokens; ++t) {
    float *gate = &gates_[t * neuron_width_ + first], *up = &ups_[t * neuron_width_ + first];
    kernels_.activate(layer.activation, layer.shift, gate, padded(neurons));
    kernels_.multiply(gate, up, gate, padded(neurons));
    std::fill(gate + neurons, gate + padded(neurons), 0.0f);
  }
  scratch.neurons_used[index] += tokens * neurons;
}

void Engine::head(std::span<const Token> tokens, float* logits, Team& team) {
  size_t wanted[kChunk], count = 0;
  for (size_t t = 0; t < tokens.size(); ++t)
    if (tokens[t].wants_logits) wanted[count++] = t;
  if (count == 0) return;
  team.for_each(count, [&](size_t i) {
    kernels_.rms_norm(&hidden_[wanted[i] * width_], decoder_.final_norm, decoder_.norm_eps,
                      decoder_.hidden_size, &normed_[i * width_]);
    if (i == 0) stats_.weight_bytes += width_ * sizeof(float);
  });
  const Projection projection{decoder_.head, logits, decoder_.vocab_size};
  project({&projection, 1}, normed_.get(), width_, count, team);
}

}  // namespace relufy
