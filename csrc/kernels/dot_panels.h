// Float dot products for 24 tokens and more (blocked.h).
//
// One token's product is 2 * kLanes sums, each of every so manieth input in ascending order, which are then
// added as a tree: both sums of a lane, then the lanes, the upper half onto the lower (simd.h). A panel keeps
// that order with outputs for lanes: a sum is a run of multiply-adds, the tree adds whole vectors, and
// nothing is shuffled but the weights, once. The inputs lie transposed too (Input::tiles), so that a step
// reads one line of them.
//
// Of a wide tile, the two sums of a lane run one after the other; of a narrow one side by side, which spares
// short rows half of the loads and stores between sums.
#pragma once

#include "blocked.h"

namespace relufy::RELUFY_KERNELS {
namespace {

constexpr size_t kFloatPanel = 2;                                                // vectors of rows
constexpr size_t kFloatTile = kRegisters == 32 ? kTileTokens : kTileTokens / 2;  // tokens, at most
constexpr size_t kFloatOutputs = kFloatPanel * kLanes;
constexpr size_t kFloatStepBytes = kFloatPanel * kVectorBytes;
constexpr size_t kSumsOfDot = 2 * kLanes;
constexpr size_t kLevels = __builtin_ctz(kSumsOfDot);  // of the tree
constexpr size_t kTileSums = kFloatTile * kFloatOutputs;
constexpr size_t kFewSteps = 8;     // of a sum: up to here tiles are narrow
constexpr size_t kLinesAhead = 64;  // of a tile of inputs
// While rows are unpacked, the next panel's are fetched; of longer ones, what lies so many bytes ahead.
constexpr size_t kShortRowBytes = 8192, kUnpackAhead = 512;

// The place of a lane in the order in which the tree reaches it, and the lane of a place: bits reversed.
constexpr size_t leaf_of(size_t lane, size_t lanes = kLanes) {
  size_t leaf = 0;
  for (size_t bit = 1; bit < lanes; bit *= 2) leaf = 2 * leaf + (lane & bit ? 1 : 0);
  return leaf;
}

// Where an input's values lie in a tile: in the order of 16 lanes' sums.
inline size_t place_in_tile(size_t i, size_t width) {
  return ((2 * leaf_of(i % 16, 16) + i / 16 % 2) * tile_steps(width) + i / 32) * kTileWidth;
}

// Where a row's sums lie in a panel, in the order of the tree.
template <Dtype D>
struct FloatShape {
  static constexpr size_t kParts = FloatChunk<D>::kParts;
  size_t width, vectors, distance, sums_at_once;

  FloatShape(size_t length, size_t input_width)
      : width(input_width), vectors(row_bytes(D, length) / kVectorBytes) {
    distance = (steps(0) | 1) * kFloatStepBytes;  // no power of two: sums would share cache lines
    sums_at_once = kSumsOfDot;
    while (sums_at_once > kSumsOfDot / 4 && sums_at_once * distance > kDotPanel) sums_at_once /= 2;
  }

  size_t steps(size_t which) const { return kParts == 2 ? vectors : (vectors + 1 - which) / 2; }

  // What a step of a sum reads of a tile.
  const float* input(const float* tile, size_t sum, size_t step) const {
    if constexpr (kLanes == 16) return tile + (sum * tile_steps(width) + step) * kTileWidth;
    size_t i = kParts == 2 ? element_of<D>(step, sum % 2) : element_of<D>(2 * step + sum % 2, 0);
    return tile + place_in_tile(i + leaf_of(sum / 2), width);
  }
};

// kFloatOutputs rows of a list, the last one again where there are no more.
struct FloatRows {
  size_t count, index[kFloatOutputs];
  const uint8_t *rows[kFloatOutputs], *ahead[kFloatOutputs];
  bool is_run;

  FloatRows(const StoredRows& w, const RowList& list, size_t j)
      : count(list.count - j < kFloatOutputs ? list.count - j : kFloatOutputs),
        is_run(!list.list && count == kFloatOutputs) {
    for (size_t r = 0; r < kFloatOutputs; ++r) {
      index[r] = list[j + (r < count ? r : count - 1)];
      rows[r] = w.row(index[r]);
      size_t next = j + r + kFloatOutputs;
      if (row_bytes(w.dtype, w.length) > kShortRowBytes)
        ahead[r] = rows[r] + kUnpackAhead;
      else
        ahead[r] = w.row(list[next < list.count ? next : list.count - 1]);
    }
  }

  // The sums [first, first + shape.sums_at_once).
  template <Dtype D>
  void unpack(const FloatShape<D>& shape, size_t first, uint8_t* panel) const {
    constexpr size_t kQuarter = kSumsOfDot / 4;
    size_t quarter = first / kQuarter;
    if (shape.sums_at_once == kSumsOfDot) return unpack_lanes<D, 0, 2, 1, 3>(shape, first, panel);
    if (shape.sums_at_once == 2 * kQuarter)
      return quarter == 0 ? unpack_lanes<D, 0, 2>(shape, first, panel)
                          : unpack_lanes<D, 1, 3>(shape, first, panel);
    if (quarter == 0) unpack_lanes<D, 0>(shape, first, panel);
    if (quarter == 1) unpack_lanes<D, 2>(shape, first, panel);
    if (quarter == 2) unpack_lanes<D, 1>(shape, first, panel);
    if (quarter == 3) unpack_lanes<D, 3>(shape, first, panel);
  }

  // Both sums of the lanes K, K + 4, ..., the first of which is `first`.
  template <Dtype D, size_t... K>
  void unpack_lanes(const FloatShape<D>& shape, size_t first, uint8_t* panel) const {
    for (size_t p = 0; p < kFloatPanel; ++p)
      for (size_t v = 0; v < shape.vectors; ++v)
        for (size_t part = 0; part < shape.kParts; ++part) {
          size_t which = shape.kParts == 2 ? part : v % 2, step = shape.kParts == 2 ? v : v / 2;
          uint8_t* out = panel + step * kFloatStepBytes + p * kVectorBytes;
          ivec lanes[kLanes];
          for (size_t r = 0; r < kLanes; ++r) {
            const uint8_t* at = rows[p * kLanes + r] + v * kVectorBytes;
            if (part == 0) prefetch(ahead[p * kLanes + r] + v * kVectorBytes);
            lanes[r] = (ivec)FloatChunk<D>::part(at, part);
          }
          auto put = [&](size_t lane, ivec column) {
            store_as(out + (2 * leaf_of(lane) + which - first) * shape.distance, column);
          };
          (for_each_fourth_column<K>(lanes, put), ...);
        }
  }

  // y of T tokens <- their sums.
  void finish(const float* sums, size_t tokens, float* y, size_t y_stride) const {
    for (size_t t = 0; t < tokens; ++t, sums += kFloatOutputs, y += y_stride)
      if (is_run)
        std::memcpy(y + index[0], sums, kFloatOutputs * sizeof(float));
      else
        for (size_t r = 0; r < count; ++r) y[index[r]] = sums[r];
  }
};

// A step of one sum, of T tokens.
template <size_t T>
inline __attribute__((always_inline)) void add_step(const uint8_t* weights, const float* inputs,
                                                    vec sums[T][kFloatPanel]) {
  vec held[kFloatPanel];
  for (size_t v = 0; v < kFloatPanel; ++v) {
    vec weight = load_as<vec>(weights + v * kVectorBytes);
    hold(weight);
    held[v] = weight;
  }
  prefetch(inputs + kLinesAhead * kTileWidth);
  for (size_t t = 0; t < T; ++t) {
    vec input = broadcast(inputs + t);
    hold(input);
    for (size_t v = 0; v < kFloatPanel; ++v) sums[t][v] = held[v] * input + sums[t][v];
  }
}

// The sum `sum` of T tokens.
template <Dtype D, size_t T>
inline void add_steps(const FloatShape<D>& shape, const uint8_t* panel, size_t sum, const float* inputs,
                      vec sums[T][kFloatPanel]) {
  for (size_t step = 0; step < shape.steps(sum % 2); ++step)
    add_step<T>(panel + step * kFloatStepBytes, shape.input(inputs, sum, step), sums);
}

// The sums `sum` and, apart, `sum` + 1, step by step; `sum` is even.
template <Dtype D, size_t T>
inline void add_both_steps(const FloatShape<D>& shape, const uint8_t* panel, size_t sum, const float* inputs,
                           vec sums[T][kFloatPanel]) {
  vec odd[T][kFloatPanel] = {};
  size_t both = shape.steps(1);
  for (size_t step = 0; step < both; ++step) {
    const uint8_t* weights = panel + step * kFloatStepBytes;
    add_step<T>(weights, shape.input(inputs, sum, step), sums);
    add_step<T>(weights + shape.distance, shape.input(inputs, sum + 1, step), odd);
  }
  if (shape.steps(0) > both)
    add_step<T>(panel + both * kFloatStepBytes, shape.input(inputs, sum, both), sums);
  for (size_t t = 0; t < T; ++t)
    for (size_t v = 0; v < kFloatPanel; ++v) sums[t][v] = sums[t][v] + odd[t][v];
}

// The sums [first, first + shape.sums_at_once) of T tokens, and what of the tree they complete: `levels` has
// kTileSums for each level. Half as many tokens leave room for two sums at a time.
template <Dtype D, size_t T>
inline void multiply_float(const FloatShape<D>& shape, const uint8_t* panel, size_t first,
                           const float* inputs, float* levels) {
  constexpr size_t kAtOnce = T <= kFloatTile / 2 ? 2 : 1;
  for (size_t sum = first; sum < first + shape.sums_at_once; sum += kAtOnce) {
    vec sums[T][kFloatPanel] = {};
    if constexpr (kAtOnce == 2)
      add_both_steps<D, T>(shape, panel, sum, inputs, sums);
    else
      add_steps<D, T>(shape, panel, sum, inputs, sums);
    panel += kAtOnce * shape.distance;
    float* level = levels + (kAtOnce - 1) * kTileSums;
    for (size_t bits = sum / kAtOnce; bits & 1; bits >>= 1, level += kTileSums)
      for (size_t t = 0; t < T; ++t)
        for (size_t v = 0; v < kFloatPanel; ++v)
          sums[t][v] = load(level + t * kFloatOutputs + v * kLanes) + sums[t][v];
    for (size_t t = 0; t < T; ++t)
      for (size_t v = 0; v < kFloatPanel; ++v) store(level + t * kFloatOutputs + v * kLanes, sums[t][v]);
  }
}

template <Dtype D>
void dot_panels(const StoredRows& w, const RowList& list, const Input& x, size_t tokens, void* scratch,
                float* y, size_t y_stride) {
  FloatShape<D> shape(w.length, x.stride);
  constexpr size_t kTileLevels = (kLevels + 1) * kTileSums;
  size_t tile = shape.steps(0) <= kFewSteps ? kFloatTile / 2 : kFloatTile;
  Carver carver(scratch);
  uint8_t* panel = carver.take<uint8_t>(shape.sums_at_once * shape.distance);
  float* levels = carver.take<float>(kTileLevels * (tokens / kFloatTile + 1));
  bool is_whole = shape.sums_at_once == kSumsOfDot;
  for (size_t j = 0; j < list.count; j += kFloatOutputs) {
    FloatRows rows(w, list, j);
    for (size_t first = 0; first < kSumsOfDot; first += shape.sums_at_once) {
      rows.template unpack<D>(shape, first, panel);
      bool is_last = first + shape.sums_at_once == kSumsOfDot;
      for (size_t t = 0; t < tokens; t += tile) {
        float* own = levels + (is_whole ? 0 : t / kFloatTile * kTileLevels);
        const float* inputs = x.tiles + t / kTileTokens * tile_size(x.stride) + t % kTileTokens;
        size_t size = tokens - t < tile ? tokens - t : tile;
        call_with<kFloatTile>(size,
                              [&](auto T) { multiply_float<D, T()>(shape, panel, first, inputs, own); });
        if (is_last) rows.finish(own + kLevels * kTileSums, size, y + t * y_stride, y_stride);
      }
    }
  }
}

// x as panels read it, of at most kTileTokens tokens.
void interleave(const float* x, size_t x_stride, size_t tokens, size_t n, float* tile) {
  for (size_t i = 0; i < n; i += kLanes)
    for (size_t t = 0; t < kTileTokens; t += kLanes) {
      ivec lanes[kLanes];
      for (size_t k = 0; k < kLanes; ++k)
        lanes[k] = t + k < tokens ? load_as<ivec>(x + (t + k) * x_stride + i) : ivec{};
      for_each_column(lanes,
                      [&](size_t c, ivec column) { store_as(tile + place_in_tile(i + c, n) + t, column); });
    }
}

}  // namespace
}  // namespace relufy::RELUFY_KERNELS
