// Sums of stored rows, for one token or a few: what the listed inputs, or neurons, add to all outputs.
//
// Floats: a few rows a pass over y, in ascending order. Integers: the coefficients (input x the row's scale)
// are scaled to 16 bits by their largest; eight rows a pass; the bytes of four rows are laid side by side
// so that one instruction multiplies and adds all four, once for the high and once for the low byte of the
// coefficients. Sums are exact, so neither the grouping of the rows nor the tile of the outputs is in the
// result.
#pragma once

#include "../kernels.h"
#include "../simd.h"
#include "carver.h"
#include "dot.h"
#include "quantise.h"

namespace relufy::RELUFY_KERNELS {
namespace {

inline void clear(float* y, size_t n) {
  for (size_t j = 0; j < n; j += kLanes) store(y + j, vec{});
}

// Turns -0 into +0, the one trace that a term of zero could leave in a sum.
inline void normalise_zero(float* y, size_t n) {
  for (size_t j = 0; j < n; j += kLanes) store(y + j, load(y + j) + broadcast(0.0f));
}

// ---- floats

constexpr size_t kFloatBatch = 8;  // rows a pass

template <Dtype D, size_t N>
inline void add_rows(const uint8_t* const* rows, const float* c, size_t width, float* y) {
  size_t vectors = part_bytes(D, width) / kVectorBytes;
  for (size_t v = 0; v < vectors; ++v)
    for (size_t part = 0; part < FloatChunk<D>::kParts; ++part) {
      float* out = y + element_of<D>(v, part);
      vec sum = load(out);
      for (size_t r = 0; r < N; ++r) sum = FloatChunk<D>::part(rows[r] + v * kVectorBytes, part) * c[r] + sum;
      store(out, sum);
    }
}

template <Dtype D, size_t N>
inline void add_float_rows(const StoredRows& w, size_t first, size_t width, const uint32_t* list,
                           const float* x, size_t x_stride, size_t tokens, float* y, size_t y_stride) {
  const uint8_t* rows[N];
  for (size_t r = 0; r < N; ++r) rows[r] = w.row(list[r]) + part_bytes(D, first);
  for (size_t t = 0; t < tokens; ++t) {
    float coefficients[N];
    for (size_t r = 0; r < N; ++r) coefficients[r] = x[t * x_stride + list[r]];
    add_rows<D, N>(rows, coefficients, width, y + t * y_stride);
  }
}

template <Dtype D>
void scatter_streamed_float(const StoredRows& w, size_t first, size_t width, const uint32_t* list,
                            size_t count, const float* x, size_t x_stride, size_t tokens, void*, float* y,
                            size_t y_stride) {
  for (size_t t = 0; t < tokens; ++t) clear(y + t * y_stride, width);
  size_t i = 0;
  for (; i + kFloatBatch <= count; i += kFloatBatch)
    add_float_rows<D, kFloatBatch>(w, first, width, list + i, x, x_stride, tokens, y, y_stride);
  for (; i < count; ++i) add_float_rows<D, 1>(w, first, width, list + i, x, x_stride, tokens, y, y_stride);
  for (size_t t = 0; t < tokens; ++t) normalise_zero(y + t * y_stride, width);
}

// ---- integers

constexpr size_t kFours = 2, kBatch = 4 * kFours;  // rows a pass

inline size_t padded_coefficients(size_t count) { return round_up(count, 16) + 16; }

// Scratch, carved out of one block of memory.
struct Scatter {
  size_t tokens, padded_count, tile, groups;
  float* products;     // [padded_count], of one token
  int16_t* q;          // [tokens][padded_count]: the coefficients
  int8_t *high, *low;  // [tokens][padded_count]: their bytes, q = 256 * high + low
  float* scale;        // [tokens]
  int32_t* sums;       // [tokens][tile / kVectorBytes][4][2][kLanes]: of products with high and with low
  int32_t* limbs;      // int4: [tokens][4 rows each][2][groups]: their bytes, a 32-bit lane for each group
  int32_t* excess;     // int4: [tokens][2][groups]: 8 times the sums of the group's coefficients
  int64_t* total;      // int8: [tokens]: 128 times the sum of the coefficients

  Scatter(void* memory, size_t count, size_t tokens_, size_t tile_)
      : tokens(tokens_),
        padded_count(padded_coefficients(count)),
        tile(tile_),
        groups(round_up(tile_ / 32, 32)) {
    Carver carver(memory);
    products = carver.take<float>(padded_count);
    q = carver.take<int16_t>(tokens * padded_count);
    high = carver.take<int8_t>(tokens * padded_count);
    low = carver.take<int8_t>(tokens * padded_count);
    scale = carver.take<float>(tokens);
    total = carver.take<int64_t>(tokens);
    sums = carver.take<int32_t>(tokens * tile * 2);
    limbs = carver.take<int32_t>(tokens * 2 * kFours * groups);
    excess = carver.take<int32_t>(tokens * 2 * groups);
  }
};

// The coefficients, input x the row's scale, of the listed rows for one token: hands on those from j on, in
// 16 bits, as store(j, values), and returns their scale.
template <class Store>
inline float quantise_coefficients(const float* scales, const uint32_t* list, size_t count, const float* x,
                                   float* products, Store&& store_values) {
  for (size_t j = 0; j < count; j += kLanes)
    if (j + kLanes <= count && list[j + kLanes - 1] - list[j] == kLanes - 1)
      store(products + j, load(x + list[j]) * load(scales + list[j]));
    else
      for (size_t i = j; i < j + kLanes && i < count; ++i) products[i] = x[list[i]] * scales[list[i]];
  size_t padded_count = padded_coefficients(count);
  for (size_t j = count; j < padded_count; ++j) products[j] = 0.0f;
  float scale = largest_magnitude(products, padded_count) * (1.0f / kMostQuantised);
  float inverse = inverse_of(scale);
  for (size_t j = 0; j < padded_count; j += kLanes) store_values(j, quantised(load(products + j), inverse));
  return scale;
}

inline void quantise_coefficients(Scatter& s, size_t t, const float* scales, const uint32_t* list,
                                  size_t count, const float* x) {
  ivec total = {};
  size_t at = t * s.padded_count;
  s.scale[t] = quantise_coefficients(scales, list, count, x, s.products, [&](size_t j, ivec value) {
    store_narrow(s.q + at + j, value);
    store_narrow(s.low + at + j, value);
    store_narrow(s.high + at + j, (value + 128) >> 8);
    total += value;
  });
  s.total[t] = 128 * sum_lanes(total);
}

// sums += weights of four rows, side by side, x the bytes of their coefficients.
inline void add_four(ivec sums[4][2], const bytes_t interleaved[4], bytes_t high, bytes_t low) {
  for (size_t k = 0; k < 4; ++k) {
    sums[k][0] = dot4(sums[k][0], interleaved[k], high);
    sums[k][1] = dot4(sums[k][1], interleaved[k], low);
  }
}

inline void load_sums(const int32_t* p, ivec sums[4][2]) {
  for (size_t k = 0; k < 8; ++k) sums[k / 2][k % 2] = load_as<ivec>(p + k * kLanes);
}

inline void store_sums(int32_t* p, const ivec sums[4][2]) {
  for (size_t k = 0; k < 8; ++k) store_as(p + k * kLanes, sums[k / 2][k % 2]);
}

inline bytes_t coefficient_lanes(const int8_t* four) { return (bytes_t)broadcast(load_as<int32_t>(four)); }

struct Batch {
  const uint8_t* rows[kBatch];
  const uint8_t* next[kBatch];  // to prefetch, line by line beside them (row after row is a quarter slower)
};

// The rows of a batch that runs past the end are read twice, with coefficients of zero.
inline Batch batch_at(const StoredRows& w, const uint32_t* list, size_t i, size_t count, size_t offset) {
  Batch b;
  for (size_t r = 0; r < kBatch; ++r) {
    b.rows[r] = w.row(list[i + r < count ? i + r : count - 1]) + offset;
    b.next[r] = w.row(list[i + r + kBatch < count ? i + r + kBatch : count - 1]) + offset;
  }
  return b;
}

#if RELUFY_MULTIPLIES_BYTES
inline void add_int8_batch(Scatter& s, const Batch& b, size_t i, size_t width) {
  for (size_t j = 0; j < width; j += kVectorBytes) {
    if (j % 64 == 0)
      for (size_t r = 0; r < kBatch; ++r) prefetch(b.next[r] + j);
    bytes_t side[kFours][4];
    for (size_t four = 0; four < kFours; ++four) {
      const uint8_t* const* rows = b.rows + 4 * four;
      interleave4(load_as<bytes_t>(rows[0] + j), load_as<bytes_t>(rows[1] + j), load_as<bytes_t>(rows[2] + j),
                  load_as<bytes_t>(rows[3] + j), side[four]);
    }
    for (size_t t = 0; t < s.tokens; ++t) {
      const int8_t *high = s.high + t * s.padded_count + i, *low = s.low + t * s.padded_count + i;
      int32_t* at = s.sums + (t * s.tile + j) * 2;
      ivec sums[4][2];
      load_sums(at, sums);
      for (size_t four = 0; four < kFours; ++four)
        add_four(sums, side[four], coefficient_lanes(high + 4 * four), coefficient_lanes(low + 4 * four));
      store_sums(at, sums);
    }
  }
}

#else
// Two rows side by side are widened to 16 bits, and the sums with whole coefficients are kept where the other
// way keeps those with low bytes: exact over so many rows.
constexpr size_t kExactRows = 256;
static_assert(255 + kExactRows * 255 * int64_t{kMostQuantised} <= INT32_MAX);

template <bool kIsOneToken>
inline void add_int8_shorts(Scatter& s, const Batch& b, size_t i, size_t width) {
  for (size_t j = 0; j < width; j += kVectorBytes) {
    if (j % 64 == 0)
      for (size_t r = 0; r < kBatch; ++r) prefetch(b.next[r] + j);
    bytes_t side[kBatch / 2][4];
    for (size_t t = 0; t < (kIsOneToken ? 1 : s.tokens); ++t) {
      const int16_t* q = s.q + t * s.padded_count + i;
      int32_t* at = s.sums + (t * s.tile + j) * 2;
      ivec sums[4];
      for (size_t k = 0; k < 4; ++k) sums[k] = load_as<ivec>(at + (2 * k + 1) * kLanes);
      for (size_t pair = 0; pair < kBatch / 2; ++pair) {
        if (t == 0)
          interleave4(load_as<bytes_t>(b.rows[2 * pair] + j), bytes_t{},
                      load_as<bytes_t>(b.rows[2 * pair + 1] + j), bytes_t{}, side[pair]);
        shorts both = (shorts)broadcast(load_as<int32_t>(q + 2 * pair));
        for (size_t k = 0; k < 4; ++k) sums[k] = dot2(sums[k], (shorts)side[pair][k], both);
      }
      for (size_t k = 0; k < 4; ++k) store_as(at + (2 * k + 1) * kLanes, sums[k]);
    }
  }
}

// sums: all but the low byte of those with whole coefficients to those with high bytes.
inline void carry(Scatter& s, size_t width) {
  for (size_t t = 0; t < s.tokens; ++t)
    for (size_t j = 0; j < width; j += kVectorBytes) {
      ivec sums[4][2];
      int32_t* at = s.sums + (t * s.tile + j) * 2;
      load_sums(at, sums);
      for (auto& [high, low] : sums) high += low >> 8, low &= 0xFF;
      store_sums(at, sums);
    }
}

inline void add_int8_batch(Scatter& s, const Batch& b, size_t i, size_t width) {
  if (i > 0 && i % kExactRows == 0) carry(s, width);
  if (s.tokens == 1)
    add_int8_shorts<true>(s, b, i, width);
  else
    add_int8_shorts<false>(s, b, i, width);
}
#endif

// round(q * k / 128) for the groups of four rows: their bytes, side by side, and what the nibbles' offset
// adds.
inline void scale_groups(Scatter& s, size_t t, const uint8_t* const* k, const int16_t* q, size_t count,
                         int32_t* limbs) {
  int32_t *high = limbs, *low = limbs + s.groups, *excess = s.excess + t * 2 * s.groups;
  for (size_t g = 0; g < count; g += 2 * kLanes) {
    shorts scaled[4];
    for (size_t r = 0; r < 4; ++r)
      scaled[r] =
          multiply_high_rounded(widen(reinterpret_cast<const int8_t*>(k[r]) + g) << 8, shorts{} + q[r]);
    // Two rows' bytes in each 16 bits, then two of those in each 32.
    shorts h01 = (shorts)(((ushorts)(scaled[0] + 128) >> 8) | ((ushorts)(scaled[1] + 128) & 0xFF00));
    shorts h23 = (shorts)(((ushorts)(scaled[2] + 128) >> 8) | ((ushorts)(scaled[3] + 128) & 0xFF00));
    shorts l01 = (scaled[0] & 0xFF) | (scaled[1] << 8);
    shorts l23 = (scaled[2] & 0xFF) | (scaled[3] << 8);
    ivec lanes[4];
    zip(h01, h23, lanes);
    zip(l01, l23, lanes + 2);
    bytes_t eight = bytes_t{} + 8;
    for (size_t part = 0; part < 2; ++part) {
      size_t at = g + part * kLanes;
      store_as(high + at, lanes[part]);
      store_as(low + at, lanes[2 + part]);
      store_as(excess + at, dot4(load_as<ivec>(excess + at), eight, (bytes_t)lanes[part]));
      int32_t* excess_low = excess + s.groups + at;
      store_as(excess_low, dot4(load_as<ivec>(excess_low), eight, (bytes_t)lanes[2 + part]));
    }
  }
}

// One half of the nibbles at `offset` of the rows: outputs of the groups `group` and, at odd lanes, the next.
inline void add_int4_half(Scatter& s, const Batch& b, size_t offset, size_t half, int32_t* at, size_t group) {
  bytes_t side[kFours][4];
  for (size_t four = 0; four < kFours; ++four) {
    bytes_t nibbles[4];
    for (size_t r = 0; r < 4; ++r) {
      bytes_t both = load_as<bytes_t>(b.rows[4 * four + r] + offset);
      nibbles[r] = half ? high_nibbles(both) : low_nibbles(both);
    }
    interleave4(nibbles[0], nibbles[1], nibbles[2], nibbles[3], side[four]);
  }
  size_t groups = s.groups;
  const int32_t* limbs = s.limbs + group;
  for (size_t t = 0; t < s.tokens; ++t, at += s.tile * 2, limbs += 2 * kFours * groups) {
    ivec sums[4][2];
    load_sums(at, sums);
    for (size_t four = 0; four < kFours; ++four)
      for (size_t k = 0; k < 4; ++k) {
        const int32_t* lanes = limbs + 2 * four * groups + k % 2;
        sums[k][0] = dot4(sums[k][0], side[four][k], (bytes_t)broadcast(lanes[0]));
        sums[k][1] = dot4(sums[k][1], side[four][k], (bytes_t)broadcast(lanes[groups]));
      }
    store_sums(at, sums);
  }
}

inline void add_int4_batch(Scatter& s, const Batch& b, const Batch& k, size_t i, size_t width) {
  for (size_t r = 0; r < kBatch; ++r)
    for (size_t at = 0; at < width / 32; at += 64) prefetch(k.next[r] + at);
  for (size_t t = 0; t < s.tokens; ++t)
    for (size_t four = 0; four < kFours; ++four)
      scale_groups(s, t, k.rows + 4 * four, s.q + t * s.padded_count + i + 4 * four, width / 32,
                   s.limbs + (t * kFours + four) * 2 * s.groups);
  for (size_t chunk = 0; chunk < width / 128; ++chunk) {
    for (size_t r = 0; r < kBatch; ++r) prefetch(b.next[r] + 64 * chunk);
    for (size_t v = 0; v < 64; v += kVectorBytes)
      for (size_t half = 0; half < 2; ++half)
        add_int4_half(s, b, 64 * chunk + v, half, s.sums + (128 * chunk + 64 * half + v) * 2,
                      4 * chunk + 2 * half);
  }
}

// y = scale * (256 * high + low), with the lanes of the interleaved sums back in order.
inline void finish_sums(const Scatter& s, Dtype dtype, size_t t, size_t width, float* y) {
  float scale = s.scale[t] * (dtype == Dtype::int4 ? 128.0f : 1.0f);
  const int32_t* excess = s.excess + t * 2 * s.groups;
  // 256 * (high - h) + low - l for any split of what is too much into h and l.
  int32_t total_high = static_cast<int32_t>(s.total[t] >> 8),
          total_low = static_cast<int32_t>(s.total[t] & 0xFF);
  for (size_t j = 0; j < width; j += kVectorBytes) {
    ivec sums[4][2];
    load_sums(s.sums + (t * s.tile + j) * 2, sums);
    float lanes[4][kLanes];
    for (size_t k = 0; k < 4; ++k) {
      ivec h = broadcast(total_high), l = broadcast(total_low);
      if (dtype == Dtype::int4) {
        size_t group = j / 128 * 4 + j % 128 / 64 * 2 + k % 2;
        h = broadcast(excess[group]), l = broadcast(excess[s.groups + group]);
      }
      l = sums[k][1] - l;
      h = sums[k][0] - h + (l >> 8);
      store(lanes[k], float_of(h >> 8, (h & 0xFF) << 8 | (l & 0xFF)) * scale + 0.0f);
    }
    for (size_t lane = 0; lane < kLanes; lane += 4)
      for (size_t k = 0; k < 4; ++k) std::memcpy(y + j + 4 * lane + 4 * k, lanes[k] + lane, 16);
  }
}

constexpr size_t kFirstBytes = 512;  // of the first rows

// As wide as keeps the sums near the processor.
inline size_t tile_for(size_t width, size_t tokens) {
  size_t most = tokens <= 8 ? kScatterTile : kScatterTile / 4;
  return width < most ? width : most;
}

void scatter_streamed_integer(const StoredRows& w, size_t first, size_t width, const uint32_t* list,
                              size_t count, const float* x, size_t x_stride, size_t tokens, void* scratch,
                              float* y, size_t y_stride) {
  Scatter s(scratch, count, tokens, tile_for(width, tokens));
  for (size_t i = 0; i < count && i < kBatch; ++i)  // on their way while the coefficients are made
    for (size_t at = 0; at < kFirstBytes && at < part_bytes(w.dtype, width); at += 64)
      prefetch(w.row(list[i]) + (w.dtype == Dtype::int4 ? first / 2 : first) + at);
  for (size_t t = 0; t < tokens; ++t) quantise_coefficients(s, t, w.scales, list, count, x + t * x_stride);
  for (size_t begin = 0; begin < width; begin += s.tile) {
    size_t part = width - begin < s.tile ? width - begin : s.tile;
    std::memset(s.sums, 0, tokens * s.tile * 2 * sizeof(int32_t));
    std::memset(s.excess, 0, tokens * 2 * s.groups * sizeof(int32_t));
    for (size_t i = 0; i < count; i += kBatch) {
      if (w.dtype == Dtype::int8) {
        add_int8_batch(s, batch_at(w, list, i, count, first + begin), i, part);
      } else {
        Batch k = batch_at(w, list, i, count, w.width() / 2 + (first + begin) / 32);
        add_int4_batch(s, batch_at(w, list, i, count, (first + begin) / 2), k, i, part);
      }
    }
    for (size_t t = 0; t < tokens; ++t) finish_sums(s, w.dtype, t, part, y + t * y_stride + begin);
  }
}

}  // namespace
}  // namespace relufy::RELUFY_KERNELS
