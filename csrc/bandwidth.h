// How fast this machine reads memory, and how fast the kernels do: what every other speed is held against.
#pragma once

#include "kernels.h"

namespace relufy {

// GB/s at which `threads` threads together read `bytes` of memory from end to end: the median over `seconds`.
double read_bandwidth(size_t threads, size_t bytes, double seconds);

// A product with a random matrix of `rows` outputs and `columns` inputs.
struct Measured {
  bool scatters;  // stored by input, of which a share of `density` is read; else by row, read whole
  Dtype dtype;
  size_t rows, columns;
  double density;
};

// GB/s of weights read by a kernel, over matrices that are together larger than any cache: the median over
// `seconds`, with a fresh random set of inputs each time.
double kernel_bandwidth(const Measured& measured, size_t threads, double seconds);

}  // namespace relufy
