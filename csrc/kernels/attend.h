// Attention of a KV head's queries over its blocks: scores, softmax, and the sum of values.
//
// Up to four queries share each load of a key or value; each has sums of its own, in one order.
#pragma once

#include <type_traits>

#include "../kernels.h"
#include "../simd.h"
#include "vectors.h"

namespace relufy::RELUFY_KERNELS {
namespace {

template <Dtype D>
inline vec load_kv(const uint8_t* p, size_t i) {
  if constexpr (D == Dtype::f32) return load(reinterpret_cast<const float*>(p) + i);
  if constexpr (D == Dtype::bf16) return load_bf16(reinterpret_cast<const uint16_t*>(p) + i);
  return load_f16(reinterpret_cast<const uint16_t*>(p) + i);
}

// The scores of B blocks in a row: one query's sums of one block would wait for each other.
template <Dtype D, size_t Q, size_t B>
inline void score_blocks(const Attention& a, const float* queries, const uint8_t* const* blocks,
                         float* scores, size_t stride) {
  constexpr size_t kVectors = kKvBlock / kLanes, kStep = kVectors < 4 ? kVectors : 4;
  for (size_t j = 0; j < kVectors; j += kStep) {
    vec sums[B][Q][kStep] = {};
    for (size_t i = 0; i < a.head_dim; ++i)
      for (size_t b = 0; b < B; ++b)
        for (size_t v = 0; v < kStep; ++v) {
          vec key = load_kv<D>(blocks[b], i * kKvBlock + (j + v) * kLanes);
          for (size_t q = 0; q < Q; ++q) sums[b][q][v] = key * queries[q * a.stride + i] + sums[b][q][v];
        }
    for (size_t b = 0; b < B; ++b)
      for (size_t q = 0; q < Q; ++q)
        for (size_t v = 0; v < kStep; ++v)
          store(scores + q * stride + b * kKvBlock + (j + v) * kLanes, sums[b][q][v] * a.scale);
  }
}

// Rounded to bf16, to nearest, ties to even.
inline vec round_to_bf16(vec x) {
  uvec bits = (uvec)x;
  return (vec)((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u);
}

// What few families do to the scores of a block, of which the first key is at position `start`.
template <size_t Q>
inline void adjust_block(const Attention& a, size_t first_query, size_t start, float* scores, size_t stride) {
  for (size_t q = 0; q < Q; ++q)
    for (size_t j = 0; j < kKvBlock; j += kLanes) {
      float* at = scores + q * stride + j;
      if (a.softcap > 0.0f) store(at, soft_capped(load(at), a.softcap));
      if (!a.alibi.slopes) continue;
      float slope = a.alibi.slopes[first_query + q], positions[kLanes];
      for (size_t i = 0; i < kLanes; ++i) positions[i] = static_cast<float>(start + j + i);
      vec bias = load(positions) * slope;
      if (a.alibi.rounds) bias = round_to_bf16(round_to_bf16(load(positions)) * slope);
      store(at, load(at) + bias * a.alibi.scale);
    }
}

// scores <- exp(scores - max), with zeros before `first` and from `length` to the end of its block; returns
// their sum.
inline float exponentiate(float* scores, size_t first, size_t length, size_t rounded) {
  for (size_t i = 0; i < first; ++i) scores[i] = -__builtin_inff();
  for (size_t i = length; i < rounded; ++i) scores[i] = -__builtin_inff();
  vec best = load(scores);
  for (size_t i = kLanes; i < rounded; i += kLanes) best = maximum(best, load(scores + i));
  float top = max_lanes<vec, float>(best);
  for (size_t i = 0; i < rounded; i += kLanes) store(scores + i, exp(load(scores + i) - top));
  for (size_t i = 0; i < first; ++i) scores[i] = 0.0f;
  for (size_t i = length; i < rounded; ++i) scores[i] = 0.0f;
  vec sum = {};
  for (size_t i = 0; i < rounded; i += kLanes) sum = sum + load(scores + i);
  return sum_lanes(sum);
}

// Parts of 16 lanes of values that are summed together: enough sums to hide the latency of one.
template <size_t Q>
constexpr size_t kPartsAtOnce = kRegisters * kLanes >= 128 * Q  ? 4
                                : kRegisters * kLanes >= 64 * Q ? 2
                                                                : 1;

template <size_t Q>
constexpr size_t kBlocksAtOnce = Q == 1 && kRegisters == 32 ? 4
                                 : Q == 1                   ? 2
                                                            : 1;

// sums[q] = the values' lanes [16 part, 16 (part + P)), weighed by the scores.
template <Dtype D, size_t Q, size_t P>
inline void sum_values(const Attention& a, size_t part, const float* scores, size_t stride,
                       float sums[Q][16 * P]) {
  constexpr size_t kVectors = 16 / kLanes * P, kElement = D == Dtype::f32 ? 4 : 2;
  size_t width = kv_width(a.head_dim);
  vec totals[Q][kVectors] = {};
  for (size_t begin = 0; begin < a.length; begin += kKvBlock) {
    const uint8_t* values = a.blocks[begin / kKvBlock] + (a.head_dim * kKvBlock + 16 * part) * kElement;
    size_t end = a.length - begin < kKvBlock ? a.length - begin : kKvBlock;
    for (size_t j = begin == 0 ? a.first : 0; j < end; ++j)
      for (size_t v = 0; v < kVectors; ++v) {
        vec value = load_kv<D>(values, j * width + v * kLanes);
        for (size_t q = 0; q < Q; ++q) totals[q][v] = value * scores[q * stride + begin + j] + totals[q][v];
      }
  }
  for (size_t q = 0; q < Q; ++q)
    for (size_t v = 0; v < kVectors; ++v) store(sums[q] + v * kLanes, totals[q][v]);
}

// A block's values, which are wanted after the scores, and the next block's keys.
template <Dtype D>
inline void prefetch_block(const Attention& a, size_t block, size_t num_blocks) {
  constexpr size_t kElement = D == Dtype::f32 ? 4 : 2;
  size_t keys = a.head_dim * kKvBlock * kElement, values = kv_width(a.head_dim) * kKvBlock * kElement;
  for (size_t at = 0; at < values; at += 64) prefetch_far(a.blocks[block] + keys + at);
  for (size_t at = 0; block + 1 < num_blocks && at < keys; at += 64) prefetch(a.blocks[block + 1] + at);
}

template <Dtype D, size_t Q>
inline void attend_tile(const Attention& a, size_t first_query, const float* all_queries, float* scores,
                        float* all_out) {
  const float* queries = all_queries + first_query * a.stride;
  float* out = all_out + first_query * a.stride;
  size_t rounded = round_up(a.length, kKvBlock);
  bool is_adjusted = a.softcap > 0.0f || a.alibi.slopes;
  size_t num_blocks = rounded / kKvBlock, b = 0;
  auto score = [&](auto count) {
    for (size_t k = b; k < b + count; ++k) prefetch_block<D>(a, k, num_blocks);
    score_blocks<D, Q, count()>(a, queries, a.blocks + b, scores + b * kKvBlock, rounded);
    for (size_t k = b; is_adjusted && k < b + count; ++k)
      adjust_block<Q>(a, first_query, a.alibi.start + k * kKvBlock, scores + k * kKvBlock, rounded);
    b += count;
  };
  while (b + kBlocksAtOnce<Q> <= num_blocks) score(std::integral_constant<size_t, kBlocksAtOnce<Q>>());
  while (b < num_blocks) score(std::integral_constant<size_t, 1>());
  float totals[Q];
  for (size_t q = 0; q < Q; ++q) totals[q] = exponentiate(scores + q * rounded, a.first, a.length, rounded);
  auto sum_parts = [&](size_t i, auto parts) {
    constexpr size_t kWidth = 16 * parts();
    float sums[Q][kWidth];
    sum_values<D, Q, parts()>(a, i / 16, scores, rounded, sums);
    for (size_t q = 0; q < Q; ++q)
      for (size_t j = i; j < i + kWidth && j < a.head_dim; ++j)
        out[q * a.stride + j] = sums[q][j - i] / totals[q];
  };
  constexpr size_t kParts = kPartsAtOnce<Q>;
  size_t i = 0;
  for (; i + 16 * kParts <= a.head_dim; i += 16 * kParts)
    sum_parts(i, std::integral_constant<size_t, kParts>());
  for (; i < a.head_dim; i += 16) sum_parts(i, std::integral_constant<size_t, 1>());
}

template <Dtype D>
void attend_typed(const Attention& a, const float* queries, float* scores, float* out) {
  size_t q = 0;
  for (; q + 4 <= a.count; q += 4) attend_tile<D, 4>(a, q, queries, scores, out);
  for (; q < a.count; ++q) attend_tile<D, 1>(a, q, queries, scores, out);
}

void attend(const Attention& a, const float* queries, float* scores, float* out) {
  if (a.dtype == Dtype::f32) return attend_typed<Dtype::f32>(a, queries, scores, out);
  if (a.dtype == Dtype::bf16) return attend_typed<Dtype::bf16>(a, queries, scores, out);
  attend_typed<Dtype::f16>(a, queries, scores, out);
}

}  // namespace
}  // namespace relufy::RELUFY_KERNELS
