// Integer dot products for many tokens (blocked.h).
#pragma once

#include "blocked.h"

namespace relufy::RELUFY_KERNELS {
namespace {

constexpr size_t kDotBlock = 1024;                       // inputs
constexpr size_t kMostBeside = 512, kBytesBeside = 512;  // rows and their bytes: what scatter begins with

// Panels of rows are transposed, kDotBlock inputs at a time.

// Vector `v` of a panel: int8 weights of kLanes rows. Of each four inputs the evens come first, as in
// Input::pairs.
inline void unpack_int8(const uint8_t* const* rows, size_t first, size_t count, uint8_t* out, Ahead& ahead) {
  for (size_t at = first; at < first + count; at += kVectorBytes, out += 2 * kLanes * kStepBytes) {
    ivec fours[kLanes];
    for (size_t r = 0; r < kLanes; ++r) fours[r] = load_as<ivec>(rows[r] + at);
    for (size_t r = 0; r < kLanes / 2; ++r) ahead.ask();  // a tile of few tokens asks too seldom
    for_each_column(fours, [&](size_t i, ivec column) {
      shorts both = (shorts)(column ^ static_cast<int32_t>(0x80808080u));  // less 128
      store_as(out + 2 * i * kStepBytes, (shorts)(both << 8) >> 8);
      store_as(out + (2 * i + 1) * kStepBytes, both >> 8);
    });
  }
}

// The same for int4: nibbles less 8, times the k of their group.
inline void unpack_int4(const uint8_t* const* rows, size_t k_at, size_t first, size_t count, uint8_t* out) {
  for (size_t chunk = first / 128; chunk < (first + count) / 128; ++chunk, out += 64 * kStepBytes) {
    int32_t scales[kLanes];
    for (size_t r = 0; r < kLanes; ++r) scales[r] = load_as<int32_t>(rows[r] + k_at + 4 * chunk);
    shorts k[4];
    for (size_t group = 0; group < 4; ++group) {
      ivec one = load_as<ivec>(scales) << static_cast<int32_t>(24 - 8 * group) >> 24;
      k[group] = (shorts)((one & 0xFFFF) | (one << 16));
    }
    for (size_t at = 0; at < 64; at += kVectorBytes) {
      ivec fours[kLanes];
      for (size_t r = 0; r < kLanes; ++r) fours[r] = load_as<ivec>(rows[r] + 64 * chunk + at);
      for_each_column(fours, [&](size_t i, ivec column) {
        ushorts both = (ushorts)column;
        const ushorts nibbles[4] = {both & 15, both >> 8 & 15, both >> 4 & 15, both >> 12};
        for (size_t half = 0; half < 2; ++half)
          for (size_t odd = 0; odd < 2; ++odd) {
            size_t step = 32 * half + at / 2 + 2 * i + odd;
            store_as(out + step * kStepBytes, ((shorts)nibbles[2 * half + odd] - 8) * k[2 * half + i % 2]);
          }
      });
    }
  }
}

// Rows of a panel, the last one again where there are no more.
struct PanelRows {
  size_t count, index[kOutputs];
  const uint8_t* rows[kOutputs];
  float scales[kOutputs];

  PanelRows(const StoredRows& w, const RowList& list, size_t j)
      : count(list.count - j < kOutputs ? list.count - j : kOutputs) {
    for (size_t r = 0; r < kOutputs; ++r) {
      index[r] = list[j + (r < count ? r : count - 1)];
      rows[r] = w.row(index[r]);
      scales[r] = w.scales[index[r]];
    }
  }

  bool is_half() const { return count <= kOutputs / 2; }

  template <Dtype D>
  void unpack(size_t width, size_t first, size_t inputs, uint8_t* panel, Ahead& ahead) const {
    for (size_t v = 0; v < (is_half() ? kPanel / 2 : kPanel); ++v, panel += kVectorBytes)
      if constexpr (D == Dtype::int8)
        unpack_int8(rows + v * kLanes, first, inputs, panel, ahead);
      else
        unpack_int4(rows + v * kLanes, width / 2, first, inputs, panel);
  }

  void finish(const int32_t* sums, float scale, float* y) const {
    float results[kOutputs];
    for (size_t v = 0; v < kOutputs; v += kLanes) {
      vec total = float_of(load_as<ivec>(sums + kOutputs + v), load_as<ivec>(sums + v));
      store(results + v, total * (load(scales + v) * scale) + 0.0f);
    }
    for (size_t r = 0; r < count; ++r) y[index[r]] = results[r];
  }
};

// What is wanted after the panel at row j: the next one; after the last, what lies beside listed rows (a
// neuron's down beside its up).
template <Dtype D>
inline Ahead panel_ahead(const StoredRows& w, const RowList& list, size_t j) {
  size_t used = row_bytes(D, w.length), beside = w.stride - used;
  if (j + kOutputs < list.count)
    return Ahead(w, list, j + kOutputs, j + 2 * kOutputs < list.count ? j + 2 * kOutputs : list.count, 0,
                 used);
  if (!list.list || beside == 0) return Ahead();
  return Ahead(w, list, 0, list.count < kMostBeside ? list.count : kMostBeside, used,
               beside < kBytesBeside ? beside : kBytesBeside);
}

template <Dtype D>
void dot_blocked_integer(const StoredRows& w, const RowList& list, const Input& x, size_t tokens,
                         void* scratch, float* y, size_t y_stride) {
  constexpr size_t kExact = D == Dtype::int8 ? kExactInt8 : kExactInt4;
  Carver carver(scratch);
  uint8_t* panel = carver.take<uint8_t>(kDotBlock / 2 * kStepBytes);
  int32_t* sums = carver.take<int32_t>(tokens * kSumsOfToken);
  size_t width = w.width();
  for (size_t j = 0; j < list.count; j += kOutputs) {
    PanelRows rows(w, list, j);
    Ahead ahead = panel_ahead<D>(w, list, j);
    std::memset(sums, 0, tokens * kSumsOfToken * sizeof(int32_t));
    for (size_t first = 0; first < width; first += kDotBlock) {
      size_t inputs = width - first < kDotBlock ? width - first : kDotBlock;
      rows.template unpack<D>(width, first, inputs, panel, ahead);
      for_each_tile(tokens, [&](size_t t, auto size) {
        auto multiply =
            rows.is_half() ? multiply_panel<size(), kPanel / 2, 0> : multiply_panel<size(), kPanel, 0>;
        multiply(panel, inputs / 2, kExact, x.pairs + t * x.stride + first, x.stride, sums + t * kSumsOfToken,
                 ahead);
      });
    }
    for (size_t t = 0; t < tokens; ++t) rows.finish(sums + t * kSumsOfToken, x.scale[t], y + t * y_stride);
  }
}

}  // namespace
}  // namespace relufy::RELUFY_KERNELS
