// The little that these tests need of a test framework: CHECK, and random numbers that repeat.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (false)

template <class Error, class Function>
bool throws(Function&& function) {
  try {
    function();
  } catch (const Error&) {
    return true;
  }
  return false;
}

// `n` values of a normal distribution; a share of them is zero.
inline std::vector<float> random_floats(size_t n, uint32_t seed, double share_of_zeros = 0.0) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::bernoulli_distribution is_zero(share_of_zeros);
  std::vector<float> values(n);
  for (float& value : values) value = is_zero(generator) ? 0.0f : normal(generator);
  return values;
}
