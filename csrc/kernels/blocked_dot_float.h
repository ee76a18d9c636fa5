// Float dot products for a few tokens: tiles of rows x tokens, each with one token's two sums.
//
// Nothing is laid out: that costs as much as several tokens' products (dot_panels.h).
#pragma once

#include "blocked.h"

namespace relufy::RELUFY_KERNELS {
namespace {

constexpr size_t kFloatRows = kRegisters == 32 ? 6 : 3, kFloatTokens = 2;
constexpr size_t kFloatSums = kFloatRows * kFloatTokens * 2 * kLanes;
constexpr size_t kRowBlock = 48, kTokenBlock = 32;  // whose rows, inputs and sums share the second cache
constexpr size_t kFloatBlock = 4096;                // bytes of a row: a tile's rows stay in the first cache

// A tile of rows and tokens; where they run out, the last ones again.
struct FloatTile {
  const uint8_t* rows[kFloatRows];
  const float* x[kFloatTokens];
  float* y[kFloatRows][kFloatTokens];
};

// sums += vectors [begin, end) of the tile's rows, an even number of them; from 0, the sums begin there.
template <Dtype D>
inline void add_float_tile(const FloatTile& tile, size_t begin, size_t end, float* sums) {
  using Chunk = FloatChunk<D>;
  vec totals[kFloatRows][kFloatTokens][2];
  auto sum_at = [&](size_t r, size_t t, size_t s) {
    return sums + ((r * kFloatTokens + t) * 2 + s) * kLanes;
  };
  for (size_t r = 0; r < kFloatRows; ++r)
    for (size_t t = 0; t < kFloatTokens; ++t)
      for (size_t s = 0; s < 2; ++s) totals[r][t][s] = begin == 0 ? vec{} : load(sum_at(r, t, s));
  for (size_t v = begin; v < end; v += 2)
    for (size_t which = 0; which < 2; ++which)
      for (size_t part = 0; part < Chunk::kParts; ++part) {
        size_t sum = Chunk::kParts == 2 ? part : which;
        vec inputs[kFloatTokens];
        for (size_t t = 0; t < kFloatTokens; ++t)
          inputs[t] = load(tile.x[t] + element_of<D>(v + which, part));
        for (size_t r = 0; r < kFloatRows; ++r) {
          vec weight = Chunk::part(tile.rows[r] + (v + which) * kVectorBytes, part);
          hold(weight);
          for (size_t t = 0; t < kFloatTokens; ++t)
            totals[r][t][sum] = weight * inputs[t] + totals[r][t][sum];
        }
      }
  for (size_t r = 0; r < kFloatRows; ++r)
    for (size_t t = 0; t < kFloatTokens; ++t)
      for (size_t s = 0; s < 2; ++s) store(sum_at(r, t, s), totals[r][t][s]);
}

// Adds the last vector of an odd number, and all lanes.
template <Dtype D>
inline void finish_float_tile(const FloatTile& tile, size_t vectors, const float* sums) {
  for (size_t r = 0; r < kFloatRows; ++r)
    for (size_t t = 0; t < kFloatTokens; ++t, sums += 2 * kLanes) {
      vec totals[2] = {load(sums), load(sums + kLanes)};
      for (size_t part = 0; vectors % 2 == 1 && part < FloatChunk<D>::kParts; ++part)
        totals[part] = FloatChunk<D>::part(tile.rows[r] + (vectors - 1) * kVectorBytes, part) *
                           load(tile.x[t] + element_of<D>(vectors - 1, part)) +
                       totals[part];
      *tile.y[r][t] = sum_lanes(totals[0] + totals[1]);
    }
}

template <Dtype D>
void dot_blocked_float(const StoredRows& w, const RowList& list, const Input& x, size_t tokens, void* scratch,
                       float* y, size_t y_stride) {
  size_t vectors = row_bytes(D, w.length) / kVectorBytes;
  size_t block = tokens <= 8 ? round_up(vectors, 2) : kFloatBlock / kVectorBytes;
  auto for_each_tile_of = [&](size_t j, size_t first_token, auto function) {
    float* sums = static_cast<float*>(scratch);
    for (size_t r = j; r < j + kRowBlock && r < list.count; r += kFloatRows)
      for (size_t t = first_token; t < first_token + kTokenBlock && t < tokens; t += kFloatTokens) {
        FloatTile tile;
        for (size_t k = 0; k < kFloatTokens; ++k) {
          size_t token = t + k < tokens ? t + k : tokens - 1;
          tile.x[k] = x.values + token * x.stride;
          for (size_t i = 0; i < kFloatRows; ++i) {
            size_t row = list[r + i < list.count ? r + i : list.count - 1];
            tile.rows[i] = w.row(row);
            tile.y[i][k] = y + token * y_stride + row;
          }
        }
        function(tile, sums);
        sums += kFloatSums;
      }
  };
  for (size_t j = 0; j < list.count; j += kRowBlock)
    for (size_t t = 0; t < tokens; t += kTokenBlock)
      for (size_t begin = 0; begin < vectors; begin += block) {
        size_t end = begin + block < vectors ? begin + block : vectors;
        for_each_tile_of(j, t, [&](const FloatTile& tile, float* sums) {
          add_float_tile<D>(tile, begin, end / 2 * 2, sums);
          if (end == vectors) finish_float_tile<D>(tile, vectors, sums);
        });
      }
}

}  // namespace
}  // namespace relufy::RELUFY_KERNELS
