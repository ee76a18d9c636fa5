// Masks: which entries of a vector are kept. The same on every instruction set.
#pragma once

#include <vector>

#include "decoder.h"

namespace relufy {

// Where a token stands in its sequence: some masks leave the prompt, or the first tokens, dense.
struct Place {
  size_t position, prompt_length;
};

inline bool is_dense(const Selection& s, Place place) {
  return place.position < s.dense_first || (s.decode_only && place.position < place.prompt_length);
}

// y[i] = x[i] - centre[first + i] where kept, else 0, for n entries from `first` on; x may be y.
// Not for a global mask.
void select_part(const Selection& s, Place place, const float* x, size_t first, size_t n, float* y);

// The same for a whole vector and any mask. `keys` is scratch for n numbers.
void select_whole(const Selection& s, Place place, const float* x, size_t n, float* y,
                  std::vector<uint32_t>& keys);

// z = max(z - (mean(z) + deviations * std(z)), 0): the statistical top-k of Spark Transformer and Gemma 3n.
void statistical_topk(float* z, size_t n, float deviations);

}  // namespace relufy
