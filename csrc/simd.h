// The SIMD vocabulary: everything that kernels.cpp needs to know of an instruction set.
//
// Compiler vector extensions (GCC, Clang) name the vector; its width is the only thing that differs between
// instruction sets. Rows are padded to kPadding floats, a multiple of every width, so no kernel has a tail.
// `a * b + c` becomes one fused multiply-add where the hardware has it (-ffp-contract=fast).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define RELUFY_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define RELUFY_VECTOR_BYTES 32
#else
#define RELUFY_VECTOR_BYTES 16
#endif

namespace {

typedef float vec __attribute__((vector_size(RELUFY_VECTOR_BYTES)));
typedef int32_t ivec __attribute__((vector_size(RELUFY_VECTOR_BYTES)));

constexpr size_t kLanes = RELUFY_VECTOR_BYTES / sizeof(float);

inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

inline vec broadcast(float x) { return vec{} + x; }

inline vec select(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

inline vec maximum(vec a, vec b) { return select(a > b, a, b); }

// Adds the upper half onto the lower until one lane is left: a fixed order, whatever the compiler.
inline float sum_lanes(vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (size_t half = kLanes / 2; half > 0; half /= 2)
    for (size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

inline float max_lanes(vec v) {
  float lanes[kLanes];
  store(lanes, v);
  float best = lanes[0];
  for (size_t i = 1; i < kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// exp(x) within about 2 units in the last place; x is clamped to where the result is a normal float, NaN
// stays NaN. Cody-Waite reduction to |r| <= ln(2) / 2, then the Taylor polynomial of degree 7.
inline vec exp(vec x) {
  x = select(x < -87.0f, broadcast(-87.0f), x);
  x = select(x > 88.0f, broadcast(88.0f), x);
  const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  vec n = (x * 1.44269504088896341f + rounder) - rounder;
  vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vec p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  ivec exponent = (__builtin_convertvector(n, ivec) + 127) << 23;
  return p * (vec)exponent;
}

}  // namespace
