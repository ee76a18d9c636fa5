// Chooses the form of a product: streamed from memory for one token or a few, blocked for many.
#pragma once

#include "blocked_dot.h"
#include "blocked_dot_float.h"
#include "blocked_scatter.h"
#include "dot_panels.h"

namespace relufy::RELUFY_KERNELS {
namespace {

// The least tokens for which the blocked form is the faster one, as measured. int8 needs the least unpacking,
// so that its streamed form keeps up the longest; few float rows are summed as fast as they are laid out.
template <Dtype D>
constexpr size_t kFewestForDot = D == Dtype::int8   ? 10
                                 : D == Dtype::int4 ? 6
                                                    : 2;
constexpr size_t kFewestForPanels = 64, kShortRow = 1024;  // of floats; short rows as soon as there are tiles
template <Dtype D>
constexpr size_t kFewestForScatter = D == Dtype::int8 ? 9 : 4;

template <Dtype D>
void dot_typed(const StoredRows& w, const RowList& rows, const Input& x, size_t tokens, void* scratch,
               float* y, size_t y_stride) {
  if (tokens < kFewestForDot<D>)
    dot_streamed<D>(w, rows, x, tokens, y, y_stride);
  else if constexpr (is_integer(D))
    dot_blocked_integer<D>(w, rows, x, tokens, scratch, y, y_stride);
  else if (x.tiles && tokens >= (w.length <= kShortRow ? kFewestForTiles : kFewestForPanels))
    dot_panels<D>(w, rows, x, tokens, scratch, y, y_stride);
  else
    dot_blocked_float<D>(w, rows, x, tokens, scratch, y, y_stride);
}

void dot(const StoredRows& w, const uint32_t* list, size_t first, size_t count, const Input& x, size_t tokens,
         void* scratch, float* y, size_t y_stride) {
  auto typed = w.dtype == Dtype::f32    ? dot_typed<Dtype::f32>
               : w.dtype == Dtype::bf16 ? dot_typed<Dtype::bf16>
               : w.dtype == Dtype::int8 ? dot_typed<Dtype::int8>
                                        : dot_typed<Dtype::int4>;
  typed(w, {list, first, count}, x, tokens, scratch, y, y_stride);
}

template <Dtype D>
void scatter_typed(const StoredRows& w, size_t first, size_t width, const uint32_t* list, size_t count,
                   const float* x, size_t x_stride, size_t tokens, void* scratch, float* y, size_t y_stride) {
  if (count == 0) {
    for (size_t t = 0; t < tokens; ++t) clear(y + t * y_stride, width);
    return;
  }
  bool is_few = tokens < kFewestForScatter<D>;
  if constexpr (is_integer(D))
    return (is_few ? scatter_streamed_integer : scatter_blocked_integer<D>)(w, first, width, list, count, x,
                                                                            x_stride, tokens, scratch, y,
                                                                            y_stride);
  else
    return (is_few ? scatter_streamed_float<D> : scatter_blocked_float<D>)(w, first, width, list, count, x,
                                                                           x_stride, tokens, scratch, y,
                                                                           y_stride);
}

void scatter(const StoredRows& w, size_t first, size_t width, const uint32_t* list, size_t count,
             const float* x, size_t x_stride, size_t tokens, void* scratch, float* y, size_t y_stride) {
  auto typed = w.dtype == Dtype::f32    ? scatter_typed<Dtype::f32>
               : w.dtype == Dtype::bf16 ? scatter_typed<Dtype::bf16>
               : w.dtype == Dtype::int8 ? scatter_typed<Dtype::int8>
                                        : scatter_typed<Dtype::int4>;
  typed(w, first, width, list, count, x, x_stride, tokens, scratch, y, y_stride);
}

}  // namespace
}  // namespace relufy::RELUFY_KERNELS
