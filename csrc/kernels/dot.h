// One dot product for each row, row after row as they lie in memory, for one token or a few.
#pragma once

#include <type_traits>

#include "../kernels.h"
#include "../simd.h"

namespace relufy::RELUFY_KERNELS {
namespace {

constexpr size_t kListedAhead = 4;    // rows of a list
constexpr size_t kBytesAhead = 8192;  // of rows that are all read

// The rows of a product: those of a list, or `count` from `first` on.
struct RowList {
  const uint32_t* list;
  size_t first, count;

  size_t operator[](size_t j) const { return list ? list[j] : first + j; }
};

// ---- floats: two sums over alternating vectors, added at the end, then the lanes.

template <Dtype D>
struct FloatChunk;

template <>
struct FloatChunk<Dtype::f32> {
  static constexpr size_t kElements = kLanes, kParts = 1;
  static vec part(const uint8_t* p, size_t) { return load_as<vec>(p); }
};

// The low halves of 16 words are the chunk's first 16 elements, the high halves the others.
template <>
struct FloatChunk<Dtype::bf16> {
  static constexpr size_t kElements = 2 * kLanes, kParts = 2;
  static vec part(const uint8_t* p, size_t which) {
    uvec words = load_as<uvec>(p);
    return which == 0 ? (vec)(words << 16) : (vec)(words & 0xFFFF0000u);
  }
};

// The position in a row of a part's first element, for vector `v` of the row.
template <Dtype D>
inline size_t element_of(size_t v, size_t part) {
  if constexpr (D == Dtype::f32) return v * kLanes;
  constexpr size_t kVectors = 16 / kLanes;  // in a chunk
  return v / kVectors * 32 + part * 16 + v % kVectors * kLanes;
}

template <Dtype D>
inline float dot_float(const uint8_t* row, size_t bytes, const float* x) {
  using Chunk = FloatChunk<D>;
  vec sums[2] = {};
  size_t vectors = bytes / kVectorBytes;
  auto add = [&](size_t v, size_t which) __attribute__((always_inline)) {
    for (size_t part = 0; part < Chunk::kParts; ++part) {
      size_t sum = Chunk::kParts == 2 ? part : which;
      sums[sum] = Chunk::part(row + v * kVectorBytes, part) * load(x + element_of<D>(v, part)) + sums[sum];
    }
  };
  size_t v = 0;
  for (; v + 2 <= vectors; v += 2) {
    add(v, 0);
    add(v + 1, 1);
  }
  if (v < vectors) add(v, 0);
  return sum_lanes(sums[0] + sums[1]);
}

// ---- integers: exact sums, so tiles and unrolling are free to order them.

// An exact sum as a float: the same way everywhere, and correctly rounded below 2^40.
inline float float_of(int64_t sum) {
  return static_cast<float>(static_cast<int32_t>(sum >> 16)) * 65536.0f +
         static_cast<float>(static_cast<int32_t>(sum & 0xFFFF));
}

// The same for 65536 * high + low, low in 0..65535.
inline vec float_of(ivec high, ivec low) { return to_float(high) * 65536.0f + to_float(low); }

// A sum of products, of which `excess` is too much.
inline float finish(int64_t sum, int64_t excess, float scale) {
  return float_of(sum - excess) * scale + 0.0f;
}

inline float finish(ivec high, ivec low, int64_t excess, float scale) {
  return finish(sum_lanes((to_long(high) << 8) + to_long(low)), excess, scale);
}

#if RELUFY_MULTIPLIES_BYTES
// The inputs are taken as two bytes.
template <size_t R, size_t T>
inline void dot_tile_int8(const uint8_t* const* rows, const uint8_t* const* next, const float* scales,
                          size_t bytes, const Input& x, size_t token, float* const* y, size_t y_stride) {
  constexpr size_t kSums = R * T == 1 ? 2 : 1;  // of alternating vectors, to hide the latency of one chain
  ivec high[R][T][kSums] = {}, low[R][T][kSums] = {};
  for (size_t i = 0; i < bytes; i += kSums * kVectorBytes)
    for (size_t s = 0; s < kSums; ++s) {
      size_t at = i + s * kVectorBytes;
      if (kVectorBytes == 64 && s > 0 && at >= bytes) break;
      for (size_t r = 0; r < R; ++r) {
        if (at % 64 == 0) prefetch(next[r] + at);
        bytes_t weight = load_as<bytes_t>(rows[r] + at);
        for (size_t t = 0; t < T; ++t) {
          size_t input = (token + t) * x.stride + at;
          high[r][t][s] = dot4(high[r][t][s], weight, load_as<bytes_t>(x.high + input));
          low[r][t][s] = dot4(low[r][t][s], weight, load_as<bytes_t>(x.low + input));
        }
      }
    }
  for (size_t r = 0; r < R; ++r)
    for (size_t t = 0; t < T; ++t) {
      ivec h = high[r][t][0], l = low[r][t][0];
      for (size_t s = 1; s < kSums; ++s) h += high[r][t][s], l += low[r][t][s];
      y[r][t * y_stride] = finish(h, l, 128 * x.sum[token + t], scales[r] * x.scale[token + t]);
    }
}

#else
// The weights are widened to 16 bits. A lane's sum is exact over so many weights of a row.
constexpr size_t kExactWeights = 64 * kVectorBytes;
static_assert(2 * (kExactWeights / (kVectorBytes / 2)) * 255 * int64_t{kMostQuantised} <= INT32_MAX);

template <size_t R, size_t T>
inline void dot_tile_int8(const uint8_t* const* rows, const uint8_t* const* next, const float* scales,
                          size_t bytes, const Input& x, size_t token, float* const* y, size_t y_stride) {
  longs totals[R][T] = {};
  for (size_t begin = 0; begin < bytes; begin += kExactWeights) {
    size_t end = begin + kExactWeights < bytes ? begin + kExactWeights : bytes;
    ivec sums[R][T] = {};
    for (size_t line = begin; line < end; line += 64) {
      for (size_t r = 0; r < R; ++r) prefetch(next[r] + line);
      for (size_t at = line; at < line + 64; at += kVectorBytes / 2) {
        shorts inputs[T];
        for (size_t t = 0; t < T; ++t) inputs[t] = load_as<shorts>(x.pairs + (token + t) * x.stride + at);
        for (size_t r = 0; r < R; ++r) {
          shorts weight = widen_as_pairs(rows[r] + at);
          for (size_t t = 0; t < T; ++t) {
            sums[r][t] = dot2(sums[r][t], weight, inputs[t]);
            hold(sums[r][t]);  // or products wait for their additions in memory
          }
        }
      }
    }
    for (size_t r = 0; r < R; ++r)
      for (size_t t = 0; t < T; ++t) totals[r][t] += to_long(sums[r][t]);
  }
  for (size_t r = 0; r < R; ++r)
    for (size_t t = 0; t < T; ++t)
      y[r][t * y_stride] =
          finish(sum_lanes(totals[r][t]), 128 * x.sum[token + t], scales[r] * x.scale[token + t]);
}
#endif

// 8 times the sum over groups of k times the input's sum: what the offset of the nibbles added.
inline int64_t nibble_excess(const int8_t* k, size_t count, const int16_t* groups, size_t stride) {
  ivec high = {}, low = {};
  for (size_t i = 0; i < count; i += 2 * kLanes) {
    shorts scale = widen(k + i);
    high = dot2(high, scale, load_as<shorts>(groups + i));
    low = dot2(low, scale, load_as<shorts>(groups + stride + i));
  }
  return 8 * sum_lanes((to_long(high) << 10) + to_long(low));
}

template <size_t R, size_t T>
inline void dot_tile_int4(const uint8_t* const* rows, const uint8_t* const* next, const float* scales,
                          size_t width, const Input& x, size_t token, float* const* y, size_t y_stride) {
  ivec high[R][T][2] = {}, low[R][T][2] = {};  // by half of the chunk
  size_t chunks = width / 128, k_at = width / 2;
  for (size_t r = 0; r < R; ++r)
    for (size_t at = 0; at < width / 32; at += 64) prefetch(next[r] + k_at + at);
  for (size_t c = 0; c < chunks; ++c) {
    for (size_t r = 0; r < R; ++r) {
      prefetch(next[r] + 64 * c);
      auto k = reinterpret_cast<const int8_t*>(rows[r] + k_at + 4 * c);
      shorts scale[2] = {alternate(k), alternate(k + 2)};
      for (size_t v = 0; v < 64; v += kVectorBytes) {
        bytes_t both = load_as<bytes_t>(rows[r] + 64 * c + v);
        bytes_t weight[2] = {low_nibbles(both), high_nibbles(both)};
        for (size_t t = 0; t < T; ++t)
          for (size_t half = 0; half < 2; ++half) {
            size_t input = (token + t) * x.stride + 128 * c + 64 * half + v;
            high[r][t][half] = dot2(
                high[r][t][half], pair_products(weight[half], load_as<bytes_t>(x.high + input)), scale[half]);
            low[r][t][half] = dot2(low[r][t][half],
                                   pair_products(weight[half], load_as<bytes_t>(x.low + input)), scale[half]);
          }
      }
    }
  }
  for (size_t r = 0; r < R; ++r)
    for (size_t t = 0; t < T; ++t) {
      auto k = reinterpret_cast<const int8_t*>(rows[r] + k_at);
      int64_t excess = nibble_excess(k, width / 32, x.groups + (token + t) * 2 * x.stride, x.stride);
      y[r][t * y_stride] = finish(high[r][t][0] + high[r][t][1], low[r][t][0] + low[r][t][1], excess,
                                  scales[r] * x.scale[token + t]);
    }
}

// ---- all types

template <Dtype D, size_t R, size_t T>
inline void dot_tile(const StoredRows& w, const size_t* index, const uint8_t* const* next, const Input& x,
                     size_t token, float* y, size_t y_stride) {
  const uint8_t* rows[R];
  float scales[R];
  float* out[R];
  for (size_t r = 0; r < R; ++r) {
    rows[r] = w.row(index[r]);
    if (is_integer(D)) scales[r] = w.scales[index[r]];
    out[r] = y + token * y_stride + index[r];
  }
  if constexpr (D == Dtype::int8)
    dot_tile_int8<R, T>(rows, next, scales, w.width(), x, token, out, y_stride);
  else if constexpr (D == Dtype::int4)
    dot_tile_int4<R, T>(rows, next, scales, w.width(), x, token, out, y_stride);
  else
    *out[0] = dot_float<D>(rows[0], row_bytes(D, w.length), x.values + token * x.stride);
}

template <Dtype D, size_t R>
inline void dot_group(const StoredRows& w, const size_t* index, const uint8_t* const* next, const Input& x,
                      size_t tokens, float* y, size_t y_stride) {
  size_t t = 0;
  if constexpr (is_integer(D))
    for (; t + 2 <= tokens; t += 2) dot_tile<D, R, 2>(w, index, next, x, t, y, y_stride);
  for (; t < tokens; ++t) dot_tile<D, R, 1>(w, index, next, x, t, y, y_stride);
}

// One row at a time for one token, for memory is read best in one stream; several for more, to share inputs.
//
// Integer rows are prefetched by hand, line by line: the next listed ones, or what lies a few rows on (the
// group scales at the end of int4's rows break the run that the processor would follow). On floats that only
// costs. What lies beside a listed row (a neuron's down beside its up) will be wanted next.
template <Dtype D>
void dot_streamed(const StoredRows& w, const RowList& rows, const Input& x, size_t tokens, float* y,
                  size_t y_stride) {
  auto group = [&]<size_t R>(size_t j, std::integral_constant<size_t, R>) {
    size_t index[R];
    const uint8_t* next[R];
    for (size_t r = 0; r < R; ++r) {
      index[r] = rows[j + r];
      size_t ahead = j + r + (rows.list ? R * kListedAhead : 0);
      next[r] = w.row(rows[ahead < rows.count ? ahead : j + r]);
      if (!rows.list) next[r] += round_up(kBytesAhead, w.stride);
      for (size_t at = row_bytes(D, w.length); rows.list && at < w.stride; at += 64)
        prefetch_far(next[r] + at);
    }
    dot_group<D, R>(w, index, next, x, tokens, y, y_stride);
  };
  constexpr size_t R = D == Dtype::int8 ? 4 : 2;
  size_t j = 0;
  if constexpr (is_integer(D))
    for (; tokens > 1 && j + R <= rows.count; j += R) group(j, std::integral_constant<size_t, R>());
  for (; j < rows.count; ++j) group(j, std::integral_constant<size_t, 1>());
}

}  // namespace
}  // namespace relufy::RELUFY_KERNELS
