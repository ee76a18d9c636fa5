// See kernels.h for what each function promises. Compiled once per instruction set, under its own namespace;
// nothing with external linkage may be included here but the table itself, or the linker could pick another
// set's copy.
#include "kernels.h"

#include "simd.h"

namespace relufy::RELUFY_KERNELS {
namespace {

constexpr size_t kRows = 4;          // rows in flight: hides the latency of memory
constexpr size_t kTokens = 2;        // tokens that share a load of those rows
constexpr size_t kAccumulators = 2;  // independent sums of a dot, so that additions overlap

// A dot is kAccumulators sums over interleaved vectors, added pairwise, then its lanes. The same in every
// tile.
template <size_t ROWS, size_t TOKENS>
inline void dot_tile(const float* w, size_t stride, const float* x, size_t x_stride, float* y,
                     size_t y_stride) {
  vec sums[ROWS][TOKENS][kAccumulators] = {};
  size_t i = 0;
  for (; i + kLanes * kAccumulators <= stride; i += kLanes * kAccumulators)
    for (size_t a = 0; a < kAccumulators; ++a)
      for (size_t r = 0; r < ROWS; ++r) {
        vec weight = load(w + r * stride + i + a * kLanes);
        for (size_t t = 0; t < TOKENS; ++t)
          sums[r][t][a] = weight * load(x + t * x_stride + i + a * kLanes) + sums[r][t][a];
      }
  if (i < stride)  // an odd number of vectors: only where a vector is as wide as the padding
    for (size_t r = 0; r < ROWS; ++r) {
      vec weight = load(w + r * stride + i);
      for (size_t t = 0; t < TOKENS; ++t) sums[r][t][0] = weight * load(x + t * x_stride + i) + sums[r][t][0];
    }
  for (size_t r = 0; r < ROWS; ++r)
    for (size_t t = 0; t < TOKENS; ++t) y[t * y_stride + r] = sum_lanes(sums[r][t][0] + sums[r][t][1]);
}

template <size_t ROWS>
inline void dot_row_group(const float* w, size_t stride, const float* x, size_t x_stride, size_t tokens,
                          float* y, size_t y_stride) {
  size_t t = 0;
  for (; t + kTokens <= tokens; t += kTokens)
    dot_tile<ROWS, kTokens>(w, stride, x + t * x_stride, x_stride, y + t * y_stride, y_stride);
  for (; t < tokens; ++t)
    dot_tile<ROWS, 1>(w, stride, x + t * x_stride, x_stride, y + t * y_stride, y_stride);
}

void dot_rows(const float* w, size_t stride, size_t rows, const float* x, size_t x_stride, size_t tokens,
              float* y, size_t y_stride) {
  size_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    dot_row_group<kRows>(w + r * stride, stride, x, x_stride, tokens, y + r, y_stride);
  for (; r < rows; ++r) dot_row_group<1>(w + r * stride, stride, x, x_stride, tokens, y + r, y_stride);
}

// y += c[0] * w[0] + ... + c[N-1] * w[N-1], one after the other: one pass over y for N rows.
template <size_t N>
inline void axpy_rows(const float* const* w, const float* c, size_t n, float* y) {
  for (size_t j = 0; j < n; j += kLanes) {
    vec sum = load(y + j);
    for (size_t r = 0; r < N; ++r) sum = load(w[r] + j) * c[r] + sum;
    store(y + j, sum);
  }
}

inline void clear(float* y, size_t n) {
  for (size_t j = 0; j < n; j += kLanes) store(y + j, vec{});
}

// Turns -0 into +0, the one trace that a term of zero could leave in a sum.
inline void normalise_zero(float* y, size_t n) {
  for (size_t j = 0; j < n; j += kLanes) store(y + j, load(y + j) + broadcast(0.0f));
}

template <size_t N>
inline void add_columns(const float* w, size_t stride, size_t width, const uint32_t* inputs, const float* x,
                        size_t x_stride, size_t tokens, float* y, size_t y_stride) {
  const float* rows[N];
  for (size_t r = 0; r < N; ++r) rows[r] = w + inputs[r] * stride;
  for (size_t t = 0; t < tokens; ++t) {
    float coefficients[N];
    for (size_t r = 0; r < N; ++r) coefficients[r] = x[t * x_stride + inputs[r]];
    axpy_rows<N>(rows, coefficients, width, y + t * y_stride);
  }
}

void sum_columns(const float* w, size_t stride, size_t width, const uint32_t* inputs, size_t num_inputs,
                 const float* x, size_t x_stride, size_t tokens, float* y, size_t y_stride) {
  for (size_t t = 0; t < tokens; ++t) clear(y + t * y_stride, width);
  size_t i = 0;
  for (; i + kRows <= num_inputs; i += kRows)
    add_columns<kRows>(w, stride, width, inputs + i, x, x_stride, tokens, y, y_stride);
  for (; i < num_inputs; ++i) add_columns<1>(w, stride, width, inputs + i, x, x_stride, tokens, y, y_stride);
  for (size_t t = 0; t < tokens; ++t) normalise_zero(y + t * y_stride, width);
}

template <size_t N>
inline void neuron_group(const float* bundle, size_t stride, const uint32_t* list, const float* g,
                         size_t g_stride, const float* x, size_t x_stride, size_t tokens, bool all, float* y,
                         size_t y_stride) {
  const float* down[N];
  for (size_t r = 0; r < N; ++r) down[r] = bundle + list[r] * 2 * stride + stride;
  for (size_t t = 0; t < tokens; ++t) {
    float coefficients[N];
    bool has_active = false;
    for (size_t r = 0; r < N; ++r) {
      float gate = g[t * g_stride + list[r]];
      coefficients[r] = 0.0f;
      if (gate == 0.0f && !all) continue;
      dot_tile<1, 1>(bundle + list[r] * 2 * stride, stride, x + t * x_stride, x_stride, &coefficients[r], 1);
      coefficients[r] *= gate;
      has_active = true;
    }
    if (has_active) axpy_rows<N>(down, coefficients, stride, y + t * y_stride);
  }
}

void neurons(const float* bundle, size_t stride, const uint32_t* list, size_t num_listed, const float* g,
             size_t g_stride, const float* x, size_t x_stride, size_t tokens, bool all, float* y,
             size_t y_stride) {
  size_t i = 0;
  for (; i + kRows <= num_listed; i += kRows)
    neuron_group<kRows>(bundle, stride, list + i, g, g_stride, x, x_stride, tokens, all, y, y_stride);
  for (; i < num_listed; ++i)
    neuron_group<1>(bundle, stride, list + i, g, g_stride, x, x_stride, tokens, all, y, y_stride);
}

size_t list_active(const float* x, size_t x_stride, size_t tokens, size_t n, uint32_t* list,
                   uint64_t* nonzeros) {
  size_t count = 0;
  for (size_t i = 0; i < n; ++i) {
    size_t users = 0;
    for (size_t t = 0; t < tokens; ++t) users += x[t * x_stride + i] != 0.0f;
    list[count] = static_cast<uint32_t>(i);
    count += users > 0;
    *nonzeros += users;
  }
  return count;
}

// `x < 0 ? 0 : x` rather than max: a NaN stays a NaN, and is seen.
inline vec relu(vec x) { return select(x < vec{}, vec{}, x); }

inline vec silu(vec x) { return x / (exp(-x) + 1.0f); }

void activate(Activation activation, float shift, float* g, size_t n) {
  for (size_t i = 0; i < n; i += kLanes) {
    vec x = load(g + i) - shift;
    if (activation == Activation::silu) x = silu(x);
    if (activation == Activation::relu) x = relu(x);
    if (activation == Activation::relu2) x = relu(x) * relu(x);
    store(g + i, x);
  }
}

void multiply(const float* g, const float* u, float* a, size_t n) {
  for (size_t i = 0; i < n; i += kLanes) store(a + i, load(g + i) * load(u + i));
}

void add(const float* x, float* y, size_t n) {
  for (size_t i = 0; i < n; i += kLanes) store(y + i, load(y + i) + load(x + i));
}

void add_partials(const float* partials, size_t distance, size_t count, size_t n, float* y) {
  for (size_t i = 0; i < n; i += kLanes) {
    vec sum = {};
    for (size_t p = 0; p < count; ++p) sum = sum + load(partials + p * distance + i);
    store(y + i, load(y + i) + sum);
  }
}

void rms_norm(const float* x, const float* weight, float eps, size_t n, float* y) {
  vec squares = {};
  for (size_t i = 0; i < padded(n); i += kLanes) squares = load(x + i) * load(x + i) + squares;
  float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / static_cast<float>(n) + eps);
  for (size_t i = 0; i < padded(n); i += kLanes) store(y + i, load(x + i) * scale * load(weight + i));
}

void rotate(const float* cosine, const float* sine, size_t head_dim, float* head) {
  size_t half = head_dim / 2;
  for (size_t i = 0; i < half; ++i) {
    float a = head[i], b = head[i + half];
    head[i] = a * cosine[i] - b * sine[i];
    head[i + half] = b * cosine[i] + a * sine[i];
  }
}

inline void score_block(const float* query, const float* keys, size_t head_dim, float scale, float* scores) {
  vec sums[kKvBlock / kLanes] = {};
  for (size_t i = 0; i < head_dim; ++i)
    for (size_t j = 0; j < kKvBlock / kLanes; ++j)
      sums[j] = load(keys + i * kKvBlock + j * kLanes) * query[i] + sums[j];
  for (size_t j = 0; j < kKvBlock / kLanes; ++j) store(scores + j * kLanes, sums[j] * scale);
}

// scores <- exp(scores - max), with zeros from `length` to the end of its block; returns their sum.
inline float exponentiate(float* scores, size_t length, size_t rounded) {
  for (size_t i = length; i < rounded; ++i) scores[i] = -__builtin_inff();
  vec best = load(scores);
  for (size_t i = kLanes; i < rounded; i += kLanes) best = maximum(best, load(scores + i));
  float top = max_lanes(best);
  for (size_t i = 0; i < rounded; i += kLanes) store(scores + i, exp(load(scores + i) - top));
  for (size_t i = length; i < rounded; ++i) scores[i] = 0.0f;
  vec sum = {};
  for (size_t i = 0; i < rounded; i += kLanes) sum = sum + load(scores + i);
  return sum_lanes(sum);
}

void attend(const float* query, const float* const* blocks, size_t length, size_t head_dim, float scale,
            float* scores, float* out) {
  size_t num_blocks = (length + kKvBlock - 1) / kKvBlock;
  for (size_t b = 0; b < num_blocks; ++b)
    score_block(query, blocks[b], head_dim, scale, scores + b * kKvBlock);
  float total = exponentiate(scores, length, num_blocks * kKvBlock);
  size_t width = padded(head_dim);
  alignas(64) float sum[1024];
  clear(sum, width);
  for (size_t j = 0; j < length; ++j) {
    const float* value = blocks[j / kKvBlock] + head_dim * kKvBlock + (j % kKvBlock) * width;
    axpy_rows<1>(&value, &scores[j], width, sum);
  }
  for (size_t i = 0; i < head_dim; ++i) out[i] = sum[i] / total;
}

}  // namespace

extern const Kernels table;
const Kernels table = {
#define RELUFY_NAME(isa) #isa
#define RELUFY_STRING(isa) RELUFY_NAME(isa)
    RELUFY_STRING(RELUFY_KERNELS),
    dot_rows,
    sum_columns,
    neurons,
    list_active,
    activate,
    multiply,
    add,
    add_partials,
    rms_norm,
    rotate,
    attend};

}  // namespace relufy::RELUFY_KERNELS
