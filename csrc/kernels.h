// The arithmetic of the engine, one table of functions for each instruction set.
//
// Contract: each element of a result is one fixed sequence of operations. It depends on the instruction set,
// never on the number of tokens in a call, on which other rows or neurons are computed, or on which thread
// calls. Terms that are exactly zero may be left out or added: sums that end at zero are normalised to +0, so
// both give the same bits.
//
// Shapes: `stride` counts floats between stored rows and is a multiple of kPadding; the padding is zero.
// Token t of an activation matrix starts at x + t * x_stride. All are f32.
#pragma once

#include <cstddef>
#include <cstdint>

namespace relufy {

constexpr size_t kPadding = 16;  // floats; a cache line
constexpr size_t kKvBlock = 32;  // positions in a block of the KV cache

static inline constexpr size_t padded(size_t n) { return (n + kPadding - 1) / kPadding * kPadding; }

enum class Activation : uint32_t { silu = 0, relu = 1, relu2 = 2 };

struct Kernels {
  const char* name;

  // y[t][r] = dot(w[r], x[t]) for r < rows: the layout for rows that are all read.
  void (*dot_rows)(const float* w, size_t stride, size_t rows, const float* x, size_t x_stride, size_t tokens,
                   float* y, size_t y_stride);

  // y[t][0..width) = sum of x[t][i] * w[i][0..width) over the listed inputs i, in ascending order: the layout
  // for sparse inputs. Stored row i holds what input i adds to the outputs. width % kPadding == 0.
  void (*sum_columns)(const float* w, size_t stride, size_t width, const uint32_t* inputs, size_t num_inputs,
                      const float* x, size_t x_stride, size_t tokens, float* y, size_t y_stride);

  // y[t] += (g[t][i] * dot(up_i, x[t])) * down_i over the listed neurons i, in ascending order, where g[t][i]
  // is not zero or `all` is set. Neuron i is stored as [up_i | down_i], `stride` floats each, side by side.
  void (*neurons)(const float* bundle, size_t stride, const uint32_t* list, size_t num_listed, const float* g,
                  size_t g_stride, const float* x, size_t x_stride, size_t tokens, bool all, float* y,
                  size_t y_stride);

  // Lists, in ascending order, the i < n where x[t][i] is not zero for at least one token; returns how many.
  // `list` has room for n + 1. Adds the number of (token, i) that are not zero to *nonzeros.
  size_t (*list_active)(const float* x, size_t x_stride, size_t tokens, size_t n, uint32_t* list,
                        uint64_t* nonzeros);

  // g = activation(g - shift), in place, n % kPadding == 0.
  void (*activate)(Activation activation, float shift, float* g, size_t n);

  // a[i] = g[i] * u[i]
  void (*multiply)(const float* g, const float* u, float* a, size_t n);

  // y[i] += x[i]
  void (*add)(const float* x, float* y, size_t n);

  // y[i] += 0 + partials[0][i] + partials[1][i] + ...: partial sums `distance` floats apart, in their order.
  void (*add_partials)(const float* partials, size_t distance, size_t count, size_t n, float* y);

  // y = x / sqrt(mean(x^2) + eps) * weight over n elements; the padding, zero in x and weight, becomes zero
  // in y.
  void (*rms_norm)(const float* x, const float* weight, float eps, size_t n, float* y);

  // Rotate the pairs (i, i + head_dim / 2) of one head by the angles whose cosines and sines are given.
  void (*rotate)(const float* cosine, const float* sine, size_t head_dim, float* head);

  // One query head against `length` positions; blocks[b] is a block's K (head_dim x kKvBlock, position
  // fastest) and, after it, its V (kKvBlock x padded(head_dim)). `scores` is scratch for length rounded up to
  // a block.
  void (*attend)(const float* query, const float* const* blocks, size_t length, size_t head_dim, float scale,
                 float* scores, float* out);
};

// Returns the kernels of the fastest instruction set here, or of the one named in $RELUFY_ISA
// ("portable", "avx2", "avx512"). Throws std::invalid_argument if that one can't run here.
const Kernels& kernels();

// Returns the kernels of a named instruction set, or nullptr if it can't run here.
const Kernels* find_kernels(const char* name);

}  // namespace relufy
