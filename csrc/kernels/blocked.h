// Products for many tokens: a piece of the matrix is laid out once, and serves every token from the cache.
//
// One token's products wait for memory. From 4 to 16 tokens on they wait for the processor, which multiplies
// two vectors a cycle at best; to feed that, an operand has to be used several times once it is in a
// register. So both kinds of product become the same one here, an outer product of registers: a tile of
//
//     kPanel vectors of outputs  x  kTile tokens
//
// stays in registers while its inputs go by, each of which costs kPanel loads of weights and kTile loads of
// one number for all lanes, for kPanel x kTile multiplications (with 32 registers: 24, by 10 loads; loads and
// multiplications go two a cycle, so that loads fit in their shadow, and the tile waits for no latency).
//
// The weights that a tile reads are a *panel*: kPanel vectors of outputs for each input, one after the
// other, unpacked. Rows that are read as dot products are transposed on the way. A panel lies in the second
// cache (128 KB at most) and is read once for every kTile tokens; what the tile reads of the tokens lies in
// the first. Unpacking costs as much as four or five tokens' multiplications (about 2.3 cycles for a vector,
// most of them shuffles), so fewer tokens stream (products.h). While a panel is multiplied, the rows of the
// next are fetched line by line (Ahead): that alone made 16 tokens 1.4 times faster from memory.
//
// Integer weights, of 8 bits or 4 bits times their group's k, are unpacked to 16, so that one instruction
// multiplies two of them with two inputs of 16 bits and adds both: 64 products a cycle, as fast as the two
// instructions with the input's two bytes that one token uses. Sums of 32 bits hold for `steps_exact` steps;
// then what is above their low 16 bits moves on to a second sum. Sums of integers are exact, so these are the
// same bits as one token's.
//
// Float sums keep the order that one token's have: rows that are added (scatter) one multiply-add for each
// input in ascending order; dot products as sums of every 32nd input, which end as a tree
// (dot_panels.h).
//
// Products a cycle and core, 128 tokens, 2048 inputs or outputs, AMD EPYC 9005 (peak 64 for integers, 32 for
// floats): dot f32 27, bf16 28, int8 57, int4 51; scatter f32 29, bf16 30, int8 52, int4 49. Dot f32 of 192
// inputs: 25.
#pragma once

#include <type_traits>

#include "../kernels.h"
#include "../simd.h"
#include "carver.h"
#include "dot.h"

namespace relufy::RELUFY_KERNELS {
namespace {

constexpr size_t kPanel = 4;                          // vectors
constexpr size_t kTile = kRegisters == 32 ? 6 : 2;    // tokens, at most
constexpr size_t kOutputs = kPanel * kLanes;          // of a panel
constexpr size_t kStepBytes = kPanel * kVectorBytes;  // of a panel, for one step
constexpr size_t kSumsOfToken = 2 * kOutputs;         // low and high
constexpr size_t kExactInt8 = 256, kExactInt4 = 32;   // steps: 2 * 127 (127 * 8) * 32512 each, less than 2^31

// Calls function(size), the size (1 to T) as a constant.
template <size_t T, class Function>
inline __attribute__((always_inline)) void call_with(size_t size, Function&& function) {
  if constexpr (T > 1)
    if (size < T) return call_with<T - 1>(size, function);
  function(std::integral_constant<size_t, T>());
}

// Calls function(first token, number of tokens), the number as a constant, for tiles of equal size or nearly.
template <class Function>
inline __attribute__((always_inline)) void for_each_tile(size_t tokens, Function&& function) {
  for (size_t t = 0; t < tokens;) {
    size_t left = tokens - t, num_tiles = (left + kTile - 1) / kTile,
           size = (left + num_tiles - 1) / num_tiles;
    call_with<kTile>(size, [&](auto constant) __attribute__((always_inline)) { function(t, constant); });
    t += size;
  }
}

// Two inputs, of 16 bits each, for all lanes.
inline shorts pair_at(const int16_t* p) { return (shorts)broadcast(load_as<int32_t>(p)); }

// Rows that will be wanted next, to be fetched into the second cache line by line while others are
// multiplied.
class Ahead {
 public:
  Ahead() = default;

  // `bytes` bytes from `offset` on of the rows [begin, end) of a list.
  Ahead(const StoredRows& w, const RowList& rows, size_t begin, size_t end, size_t offset, size_t bytes)
      : w_(&w), rows_(rows), row_(begin), end_(end), offset_(offset), bytes_(bytes) {
    if (row_ < end_) start_row();
  }

  void ask() {
    if (row_ >= end_) return;
    prefetch_far(at_);
    at_ += 64;
    if (at_ < row_end_) return;
    if (++row_ < end_) start_row();
  }

 private:
  void start_row() {
    at_ = w_->row(rows_[row_]) + offset_;
    row_end_ = at_ + bytes_;
  }

  const StoredRows* w_ = nullptr;
  RowList rows_ = {};
  size_t row_ = 0, end_ = 0, offset_ = 0, bytes_ = 0;
  const uint8_t *at_ = nullptr, *row_end_ = nullptr;
};

// sums += the first V vectors of a panel x inputs, over `steps` pairs of inputs. Token t's are at inputs + t
// * stride, for odd vectors `Odd` further on. Its sums are 65536 * high + low: kOutputs of low, then of high.
template <size_t T, size_t V, size_t Odd>
inline void multiply_panel(const uint8_t* panel, size_t steps, size_t steps_exact, const int16_t* inputs,
                           size_t stride, int32_t* sums, Ahead& ahead) {
  ivec low[T][V];
  for (size_t t = 0; t < T; ++t)
    for (size_t v = 0; v < V; ++v) low[t][v] = load_as<ivec>(sums + t * kSumsOfToken + v * kLanes);
  for (size_t step = 0; step < steps;) {
    size_t end = step + steps_exact < steps ? step + steps_exact : steps;
    for (; step < end; ++step) {
      ahead.ask();
      shorts weights[V];
      for (size_t v = 0; v < V; ++v) {
        weights[v] = load_as<shorts>(panel + step * kStepBytes + v * kVectorBytes);
        hold(weights[v]);
      }
      for (size_t t = 0; t < T; ++t) {
        const int16_t* at = inputs + t * stride + 2 * step;
        shorts even = pair_at(at), odd = Odd ? pair_at(at + Odd) : even;
        hold(even), hold(odd);
        for (size_t v = 0; v < V; ++v) low[t][v] = dot2(low[t][v], weights[v], v % 2 ? odd : even);
      }
    }
    for (size_t t = 0; t < T; ++t)
      for (size_t v = 0; v < V; ++v) {
        int32_t* high = sums + t * kSumsOfToken + kOutputs + v * kLanes;
        store_as(high, load_as<ivec>(high) + (low[t][v] >> 16));
        low[t][v] &= 0xFFFF;
      }
  }
  for (size_t t = 0; t < T; ++t)
    for (size_t v = 0; v < V; ++v) store_as(sums + t * kSumsOfToken + v * kLanes, low[t][v]);
}

}  // namespace
}  // namespace relufy::RELUFY_KERNELS
