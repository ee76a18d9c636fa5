// The arithmetic of the engine, one table of functions for each instruction set.
//
// Contract: each element of a result is one fixed sequence of operations. It depends on the instruction set,
// never on the number of tokens in a call, on which other rows or neurons are computed, or on which thread
// calls. Terms that are exactly zero may be left out or added: sums that end at zero are normalised to +0, so
// both give the same bits.
//
// Weights of 8 and 4 bits are summed in integers: the input is scaled to integers of 16 bits once, and one
// multiplication by the scales ends the sum. Integers add exactly, in any order, several times faster than
// their conversion to floats would allow. The sum s becomes the float f(s >> 16) * 65536 + f(s & 65535).
//
// Activations are f32 vectors padded with zeros to a multiple of kPadding. Token t of an activation matrix
// starts at x + t * x_stride.
#pragma once

#include <cstddef>
#include <cstdint>

namespace relufy {

constexpr size_t kPadding = 128;  // elements: the widest chunk of any type
constexpr size_t kKvBlock = 32;   // positions in a block of the KV cache
constexpr int32_t kMostQuantised = 127 * 256;

static inline constexpr size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }
static inline constexpr size_t round_up_quotient(size_t a, size_t b) { return (a + b - 1) / b; }
static inline constexpr size_t padded(size_t n) { return round_up(n, kPadding); }

// Of a tile of inputs, their values for kTileTokens tokens side by side. Every 32nd input is a step of one
// sum; the sums' steps are odd in number, for they would share cache lines.
constexpr size_t kTileTokens = 12, kTileWidth = 16;
constexpr size_t kFewestForTiles = 24;  // tokens that are laid out so
static inline constexpr size_t tile_steps(size_t width) { return (width / 32) | 1; }
static inline constexpr size_t tile_size(size_t width) { return 32 * tile_steps(width) * kTileWidth; }

// Of stored weights (docs/format.md); f16 only in the KV cache.
enum class Dtype : uint32_t { bytes = 0, f32 = 1, bf16 = 2, int8 = 3, int4 = 4, f16 = 5 };

static inline constexpr bool is_integer(Dtype d) { return d == Dtype::int8 || d == Dtype::int4; }

// Elements in a chunk: a stored row is a whole number of them.
static inline constexpr size_t chunk_of(Dtype d) {
  return d == Dtype::f32 ? 16 : d == Dtype::bf16 ? 32 : d == Dtype::int8 ? 64 : 128;
}

// Bytes of a stored row of n elements.
static inline constexpr size_t row_bytes(Dtype d, size_t n) {
  size_t length = round_up(n, chunk_of(d));
  if (d == Dtype::f32) return length * 4;
  if (d == Dtype::bf16) return length * 2;
  if (d == Dtype::int8) return length;
  return round_up(length / 2 + length / 32, 64);
}

// Bytes of a chunk-aligned part of a stored row, with its group scales.
static inline constexpr size_t part_bytes(Dtype d, size_t n) {
  return d == Dtype::int4 ? n / 2 + n / 32 : row_bytes(d, n);
}

// Weights as they lie in the file: rows of `length` elements, `stride` bytes apart.
struct StoredRows {
  const uint8_t* data = nullptr;
  size_t stride = 0, length = 0;
  Dtype dtype = Dtype::f32;
  const float* scales = nullptr;  // one for each row of an integer type

  size_t width() const { return round_up(length, chunk_of(dtype)); }
  const uint8_t* row(size_t i) const { return data + i * stride; }
  size_t scale_bytes() const { return scales ? sizeof(float) : 0; }  // of a row

  // Of so many rows that a list names, with the list and their scales.
  size_t listed_bytes(size_t listed) const {
    return listed * (row_bytes(dtype, length) + sizeof(uint32_t) + scale_bytes());
  }
};

// Input vectors as dot products read them. The quantised form is there where an integer matrix reads it:
// x = scale * (256 * high + low), the same stride in bytes.
struct Input {
  const float* values;
  size_t stride;
  const int8_t *high, *low;
  const int16_t* pairs;   // the same numbers whole; of each four the evens, then the odds
  const int16_t* groups;  // of int4: the sum over each group of 32, less its last 10 bits; then those: 2 *
                          // stride a token
  const float* scale;     // by token
  const int64_t* sum;     // of 256 * high + low, by token
  // The values as panels of float rows read them, or null: a tile for each kTileTokens tokens,
  // tile_size(stride) apart.
  const float* tiles = nullptr;
};

enum class Activation : uint32_t { silu = 0, relu = 1, relu2 = 2, gelu = 3, gelu_tanh = 4, fatrelu = 5 };

// What is added to the score of each query with the key at position i of a sequence: slope * i * scale.
struct Alibi {
  const float* slopes = nullptr;  // by query
  size_t start = 0;               // the position of the first block's first key
  float scale = 1.0f;
  bool rounds = false;  // slope * i to bf16, as it is where bf16 multiplies
};

// `count` queries of one KV head against `length` positions. blocks[b] is a block's K (head_dim x kKvBlock,
// position fastest) and, after it, its V (kKvBlock x kv_width(head_dim)). `scores` has room for count *
// length, rounded up to blocks.
struct Attention {
  const uint8_t* const* blocks;
  size_t length, head_dim, count, stride;  // of queries and outputs
  Dtype dtype;
  float scale;
  size_t first = 0;      // positions before it are not attended to; first < kKvBlock
  float softcap = 0.0f;  // 0, or scores become softcap * tanh(score / softcap)
  Alibi alibi = {};
};

static inline constexpr size_t kv_width(size_t head_dim) { return round_up(head_dim, 16); }

struct Kernels {
  const char* name;

  // y[t][r] = w[r] . x[t] for the rows r = list[0], ..., list[count - 1], or first, ..., first + count - 1
  // where list is null. `scratch` has dot_scratch bytes, 64-byte aligned.
  void (*dot)(const StoredRows& w, const uint32_t* list, size_t first, size_t count, const Input& x,
              size_t tokens, void* scratch, float* y, size_t y_stride);

  // y[t][0..width) = sum of x[t][i] * w[i][first..first + width) over the listed rows i, in ascending order.
  // first and width are whole chunks. `scratch` has scatter_scratch bytes, 64-byte aligned.
  void (*scatter)(const StoredRows& w, size_t first, size_t width, const uint32_t* list, size_t count,
                  const float* x, size_t x_stride, size_t tokens, void* scratch, float* y, size_t y_stride);

  // y[0..padded(w.length)) = row i.
  void (*expand)(const StoredRows& w, size_t i, float* y);

  // The quantised form of x[0..n), n % kPadding == 0, as Input describes it.
  void (*quantise)(const float* x, size_t n, int8_t* high, int8_t* low, int16_t* pairs, int16_t* groups,
                   float* scale, int64_t* sum);

  // A tile of at most kTileTokens tokens, as Input describes it; n % kPadding == 0.
  void (*interleave)(const float* x, size_t x_stride, size_t tokens, size_t n, float* tile);

  // Lists, in ascending order, the i < n where x[t][i] is not zero for at least one token; returns how many.
  // `list` has room for n + 16. Adds the number of (token, i) that are not zero to *nonzeros.
  size_t (*list_active)(const float* x, size_t x_stride, size_t tokens, size_t n, uint32_t* list,
                        uint64_t* nonzeros);

  // Sets of neurons (active_set.h), from `first` on, a multiple of 16. Lists, in ascending order, the i < n
  // where first + i is in at least one of `count` sets; returns how many. `list` has room for n + 16. Adds
  // the number of (set, i) to *members.
  size_t (*list_members)(const uint64_t* const* sets, size_t count, size_t first, size_t n, uint32_t* list,
                         uint64_t* members);

  // x[i] = 0 where first + i is not in the set; n and first are multiples of 16.
  void (*keep_members)(const uint64_t* set, size_t first, size_t n, float* x);

  // Writes the set of those i < n where x[i] is not below least[i], and zeros up to a whole word.
  void (*reach)(const float* x, const float* least, size_t n, uint64_t* set);

  // Writes the set of those i < n where x[i] is not zero, and zeros up to a whole word; returns their number.
  size_t (*collect)(const float* x, size_t n, uint64_t* set);

  // g = activation(g - shift), in place; `cutoff` is fatrelu's. n % 16 == 0.
  void (*activate)(Activation activation, float shift, float cutoff, float* g, size_t n);

  // a[i] = g[i] * u[i], and 0 where g[i] is 0.
  void (*multiply)(const float* g, const float* u, float* a, size_t n);

  // y[i] += x[i]
  void (*add)(const float* x, float* y, size_t n);

  // y[i] += 0 + partials[0][i] + partials[1][i] + ...: partial sums `distance` floats apart, in their order.
  void (*add_partials)(const float* partials, size_t distance, size_t count, size_t n, float* y);

  // y = x / sqrt(mean(x^2) + eps) * weight over n elements; the padding of x and weight is zero, so y's is.
  void (*rms_norm)(const float* x, const float* weight, float eps, size_t n, float* y);

  // y = (x - mean) / sqrt(variance + eps) * weight + bias over n elements; y's padding becomes zero.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, size_t n, float* y);

  // Rotate the pairs (i, i + width / 2) of one head's first `width` entries by the angles whose cosines and
  // sines are given.
  void (*rotate)(const float* cosine, const float* sine, size_t width, float* head);

  void (*attend)(const Attention& a, const float* queries, float* scores, float* out);

  // x[i] = cap * tanh(x[i] / cap), for any n.
  void (*soft_cap)(float cap, float* x, size_t n);

  // Reads `bytes` bytes, a multiple of 64, and returns something that depends on all of them.
  uint32_t (*read)(const uint8_t* p, size_t bytes);
};

// Bytes of scratch for a call of `dot` with rows of up to `length` elements.
static inline constexpr size_t kDotPanel = 288
                                           << 10;  // bytes of unpacked weights, where rows are not too long
static inline constexpr size_t dot_scratch(size_t length, size_t tokens) {
  if (tokens < 2) return 0;
  size_t longest = tile_steps(padded(length)) * 1024, panel = longest > kDotPanel ? longest : kDotPanel;
  return panel + tokens * 1024 + (64 << 10);
}

// Bytes of scratch for a call of `scatter`.
static inline constexpr size_t kScatterTile = 2048;               // outputs, for a few tokens
static inline constexpr size_t kScatterPanels = (512 + 8) << 10;  // bytes of unpacked weights, for many
static inline constexpr size_t scatter_scratch(size_t count, size_t tokens) {
  size_t few = tokens < 16 ? tokens : 16, coefficients = count + 64;
  size_t streamed = few * (coefficients * 2 * sizeof(int16_t) + kScatterTile * 2 * sizeof(int32_t) +
                           kScatterTile / 32 * 6 * sizeof(int32_t));
  size_t blocked = kScatterPanels + tokens * (coefficients * sizeof(int16_t) + 4096) + 32768;
  bool is_streamed = tokens < 2 || streamed > blocked;
  return coefficients * sizeof(float) + (is_streamed ? streamed : blocked) + 4096;
}

// Returns the kernels of the fastest instruction set here, or of the one named in $RELUFY_ISA
// ("portable", "avx2", "avx512", "neon"). Throws std::invalid_argument if that one can't run here.
const Kernels& kernels();

// Returns the kernels of a named instruction set, or nullptr if it can't run here.
const Kernels* find_kernels(const char* name);

}  // namespace relufy
