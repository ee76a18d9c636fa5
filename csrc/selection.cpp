#include "selection.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>

namespace relufy {
namespace {

float centre_of(const Selection& s, size_t i) { return s.centre ? s.centre[i] : 0.0f; }

float score_of(const Selection& s, float x, size_t i) {
  float distance = std::fabs(x - centre_of(s, i));
  return s.weight ? s.weight[i] * distance : distance;
}

// Numbers in the order of the floats, NaN above all, so that even a damaged file gives an order.
uint32_t key_of(float score) {
  uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

void select_topk(const Selection& s, const float* x, size_t n, float* y, std::vector<uint32_t>& keys) {
  size_t k = std::min(s.k, n);
  keys.resize(2 * n);
  for (size_t i = 0; i < n; ++i) keys[i] = keys[n + i] = key_of(score_of(s, x[i], i));
  if (k == 0) {
    std::fill_n(y, n, 0.0f);
    return;
  }
  auto sorted = keys.begin() + static_cast<ptrdiff_t>(n);
  std::nth_element(sorted, sorted + static_cast<ptrdiff_t>(k) - 1, keys.end(), std::greater<uint32_t>());
  uint32_t last = keys[n + k - 1];
  size_t ties = k - static_cast<size_t>(
                        std::count_if(keys.begin(), sorted, [last](uint32_t key) { return key > last; }));
  for (size_t i = 0; i < n; ++i) {
    bool is_kept = keys[i] > last || (keys[i] == last && ties > 0);
    if (keys[i] == last && ties > 0) --ties;
    y[i] = is_kept ? x[i] - centre_of(s, i) : 0.0f;
  }
}

}  // namespace

void select_part(const Selection& s, Place place, const float* x, size_t first, size_t n, float* y) {
  bool keeps_all = s.kind == Selection::Kind::none || is_dense(s, place);
  bool is_scalar = s.kind == Selection::Kind::threshold && !s.thresholds && !s.weight && !s.centre;
  if (!keeps_all && is_scalar) {  // the same as below, without branches
    for (size_t i = 0; i < n; ++i) y[i] = std::fabs(x[i]) < s.threshold ? 0.0f : x[i];
    return;
  }
  for (size_t i = 0; i < n; ++i) {
    bool is_kept = true;
    if (!keeps_all && s.kind == Selection::Kind::relu) is_kept = !(x[i] < 0.0f);
    if (!keeps_all && s.kind == Selection::Kind::threshold)
      is_kept = !(score_of(s, x[i], first + i) < (s.thresholds ? s.thresholds[first + i] : s.threshold));
    y[i] = is_kept ? x[i] - centre_of(s, first + i) : 0.0f;
  }
}

void select_whole(const Selection& s, Place place, const float* x, size_t n, float* y,
                  std::vector<uint32_t>& keys) {
  if (s.kind == Selection::Kind::topk && !is_dense(s, place)) return select_topk(s, x, n, y, keys);
  select_part(s, place, x, 0, n, y);
}

void statistical_topk(float* z, size_t n, float deviations) {
  double sum = 0.0, squares = 0.0, count = static_cast<double>(n);
  for (size_t i = 0; i < n; ++i) sum += z[i];
  double mean = sum / count;
  for (size_t i = 0; i < n; ++i) squares += (z[i] - mean) * (z[i] - mean);
  float cutoff = static_cast<float>(mean + deviations * std::sqrt(squares / count));
  for (size_t i = 0; i < n; ++i) z[i] = z[i] < cutoff ? 0.0f : z[i] - cutoff;
}

}  // namespace relufy
