// Products of the matrices outside of the MLP's partitions: masked inputs, and their outputs, shared out.
#include <algorithm>

#include "engine.h"

namespace relufy {
namespace {

constexpr size_t kTaskBytes = 65536;  // weights in a task of rows
constexpr size_t kPanelRows = 64;     // of the blocked kernels
// The least outputs in a task of columns: short runs of memory are slow.
constexpr size_t kTaskColumns = 1024;

}  // namespace

// v's token <- x under the mask of its reader, quantised where the reader, or one that shares v, wants
// integers.
void Engine::fill(Vectors& v, const Matrix& reader, Place place, size_t token, const float* x,
                  Scratch& scratch, bool others_quantise) {
  float* y = &v.x[token * v.width];
  size_t n = reader.inputs;
  if (reader.mask) {
    if (reader.rank) std::copy_n(x, n, &v.residual[token * v.width]);
    select_whole(reader.mask, place, x, n, y, scratch.keys);
    std::fill(y + n, y + v.width, 0.0f);
    if (reader.rank) {
      float* residual = &v.residual[token * v.width];
      for (size_t i = 0; i < n; ++i) residual[i] -= y[i];
      std::fill(residual + n, residual + v.width, 0.0f);
    }
  } else if (y != x) {
    std::copy_n(x, padded(n), y);
    std::fill(y + padded(n), y + v.width, 0.0f);
  }
  if (reader.reads_integers() || others_quantise) quantise(v, token);
}

void Engine::quantise(Vectors& v, size_t token) const {
  size_t at = token * v.width;
  kernels_.quantise(&v.x[at], v.width, &v.high[at], &v.low[at], &v.pairs[at], &v.groups[2 * at],
                    &v.scale[token], &v.sum[token]);
}

void Engine::make_tile(Vectors& v, size_t tile, size_t tokens) const {
  if (!v.tiles) return;
  size_t first = tile * kTileTokens;
  kernels_.interleave(&v.x[first * v.width], v.width, std::min(kTileTokens, tokens - first), v.width,
                      &v.tiles[tile * tile_size(v.width)]);
}

// Lists the i < n that some token needs: those with a nonzero x[t][i] if zeros may be skipped, else all.
// So many that a stream is faster are as good as all.
size_t Engine::list_needed(Product product, Dtype dtype, const float* x, size_t x_stride, size_t tokens,
                           size_t n, uint32_t* list, Use& used) const {
  size_t listed = kernels_.list_active(x, x_stride, tokens, n, list, &used.by_token);
  used.together += listed;
  float most = crossover_.share(product, dtype, tokens) * static_cast<float>(n);
  if (skip_ && static_cast<float>(listed) <= most) return listed;
  std::copy_n(all_.get(), n, list);
  return n;
}

void Engine::list_inputs(Vectors& v, const Matrix& reader, size_t tokens, std::vector<Use>& used,
                         size_t layer) {
  if (!reader.is_columns()) {
    used[layer] += {tokens * reader.inputs, reader.inputs};
    return;
  }
  v.listed = list_needed(Product::scatter, reader.stored.dtype, v.x.get(), v.width, tokens, reader.inputs,
                         v.list.get(), used[layer]);
  stats_.weight_bytes += v.listed * sizeof(uint32_t);
}

// How many outputs a task takes on: of rows, few, so that nobody waits long; of columns, as many as the
// threads allow, so that each stored row is read in long runs; for many tokens, a few panels of the blocked
// kernels. It changes no bit of the result.
size_t Engine::outputs_per_task(const Matrix& m, size_t tokens) const {
  if (!m.is_columns() && tokens >= kPanelTokens)
    return std::clamp<size_t>(m.outputs / (4 * pool_.size()) / kPanelRows, 1, 8) * kPanelRows;
  if (!m.is_columns()) return std::max<size_t>(16, kTaskBytes / m.stored.stride / 16 * 16);
  size_t width = m.stored.width(), tasks = std::clamp<size_t>(width / kTaskColumns, 1, 2 * pool_.size());
  return padded(round_up_quotient(width, tasks));
}

// y <- mask(x) W^T + bias for several matrices, in one round of tasks; then hidden += y where that is asked
// for.
void Engine::project(std::span<const Projection> projections, size_t tokens, Team& team) {
  if (decoder_.max_rank > 0) correct(projections, tokens, team);
  auto num_tasks = [&](const Matrix& m) { return round_up_quotient(m.outputs, outputs_per_task(m, tokens)); };
  size_t total = 0;
  for (const Projection& p : projections) total += num_tasks(*p.matrix);
  team.for_each(total, [&](size_t task) {
    const Projection* p = projections.data();
    for (; task >= num_tasks(*p->matrix); ++p) task -= num_tasks(*p->matrix);
    project_part(*p, task, tokens, scratch_[team.thread()]);
  });
}

// The first factor of each correction: low_rank <- low_rank_in (x - mask(x)).
void Engine::correct(std::span<const Projection> projections, size_t tokens, Team& team) {
  bool has_any =
      std::any_of(projections.begin(), projections.end(), [](auto& p) { return p.matrix->rank > 0; });
  if (!has_any) return;
  team.for_each(projections.size(), [&](size_t i) {
    const Matrix& m = *projections[i].matrix;
    if (m.rank == 0) return;
    Vectors& v = *projections[i].x;
    Input residual{};
    residual.values = v.residual.get();
    residual.stride = v.width;
    kernels_.dot(m.low_rank_in, nullptr, 0, m.rank, residual, tokens, scratch_[team.thread()].products.get(),
                 v.low_rank.get(), padded(decoder_.max_rank));
    size_t stride = padded(decoder_.max_rank);
    for (size_t t = 0; t < tokens; ++t)  // another correction's, perhaps of a larger rank
      std::fill(&v.low_rank[t * stride + m.rank], v.low_rank.get() + (t + 1) * stride, 0.0f);
    scratch_[team.thread()].weight_bytes += m.rank * m.low_rank_in.stride;
  });
}

void Engine::dot_rows(const Matrix& m, const Vectors& x, size_t first, size_t rows, size_t tokens, float* y,
                      size_t y_stride, Scratch& scratch) {
  kernels_.dot(m.stored, nullptr, first, rows, x.input(), tokens, scratch.products.get(), y, y_stride);
  scratch.weight_bytes += rows * (m.stored.stride + m.stored.scale_bytes());
}

void Engine::project_part(const Projection& projection, size_t task, size_t tokens, Scratch& scratch) {
  const Matrix& m = *projection.matrix;
  const Vectors& v = *projection.x;
  size_t size = outputs_per_task(m, tokens), first = task * size, stride = projection.y_stride;
  size_t outputs = std::min(size, m.outputs - first);
  float* y = projection.y + first;
  if (m.is_columns()) {
    size_t width = std::min(size, m.stored.width() - first);
    kernels_.scatter(m.stored, first, width, v.list.get(), v.listed, v.x.get(), v.width, tokens,
                     scratch.products.get(), y, stride);
    scratch.weight_bytes +=
        v.listed * (part_bytes(m.stored.dtype, width) + (task == 0 ? m.stored.scale_bytes() : 0));
  } else {
    dot_rows(m, v, first, outputs, tokens, projection.y, stride, scratch);
  }
  if (m.rank) {
    Input reduced{};
    reduced.stride = padded(decoder_.max_rank);
    for (size_t t = 0; t < tokens; t += kFewTokens) {
      size_t some = std::min(kFewTokens, tokens - t);
      reduced.values = &v.low_rank[t * reduced.stride];
      kernels_.dot(m.low_rank_out, nullptr, first, outputs, reduced, some, scratch.products.get(),
                   scratch.correction.get(), m.outputs);
      for (size_t k = 0; k < some; ++k)
        for (size_t i = 0; i < outputs; ++i)
          y[(t + k) * stride + i] += scratch.correction[k * m.outputs + first + i];
    }
    scratch.weight_bytes += outputs * m.low_rank_out.stride;
  }
  for (size_t t = 0; t < tokens; ++t) {
    if (m.bias) kernels_.add(m.bias + first, y + t * stride, round_up(outputs, 16));
    if (projection.adds_to_hidden)
      kernels_.add(y + t * stride, &hidden_[t * width_ + first], round_up(outputs, 16));
  }
}

}  // namespace relufy
