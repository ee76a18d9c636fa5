// Sets of neurons, as bits: listed, kept to, and made of what is not zero.
#pragma once

#include "../kernels.h"
#include "../simd.h"

namespace relufy::RELUFY_KERNELS {
namespace {

// The 16 members from i on, a multiple of 16.
inline uint32_t members_at(const uint64_t* set, size_t i) {
  return static_cast<uint32_t>(set[i / 64] >> (i % 64)) & 0xFFFF;
}

size_t list_members(const uint64_t* const* sets, size_t count, size_t first, size_t n, uint32_t* list,
                    uint64_t* members) {
  size_t listed = 0;
  for (size_t i = 0; i < n; i += 16) {
    uint32_t valid = n - i >= 16 ? 0xFFFF : (1u << (n - i)) - 1, any = 0;
    for (size_t s = 0; s < count; ++s) {
      uint32_t some = members_at(sets[s], first + i) & valid;
      *members += static_cast<uint64_t>(__builtin_popcount(some));
      any |= some;
    }
#if defined(__AVX512F__)
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    _mm512_storeu_si512(list + listed, _mm512_maskz_compress_epi32(
                                           static_cast<__mmask16>(any),
                                           _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(i)))));
    listed += static_cast<size_t>(__builtin_popcount(any));
#else
    for (; any; any &= any - 1) list[listed++] = static_cast<uint32_t>(i) + __builtin_ctz(any);
#endif
  }
  return listed;
}

void keep_members(const uint64_t* set, size_t first, size_t n, float* x) {
  for (size_t i = 0; i < n; i += 16) {
    uint32_t kept = members_at(set, first + i);
#if defined(__AVX512F__)
    _mm512_storeu_ps(x + i, _mm512_maskz_loadu_ps(static_cast<__mmask16>(kept), x + i));
#else
    for (size_t j = 0; j < 16; ++j) x[i + j] = kept >> j & 1 ? x[i + j] : 0.0f;
#endif
  }
}

void reach(const float* x, const float* least, size_t n, uint64_t* set) {
  for (size_t i = 0; i < n; i += 64) {
    uint64_t word = 0;
    for (size_t j = 0; j < 64 && i + j < n; j += 16) {
      size_t left = n - i - j < 16 ? n - i - j : 16;
#if defined(__AVX512F__)
      auto valid = static_cast<__mmask16>((1u << left) - 1);
      uint64_t some = _mm512_mask_cmp_ps_mask(valid, _mm512_maskz_loadu_ps(valid, x + i + j),
                                              _mm512_maskz_loadu_ps(valid, least + i + j), _CMP_NLT_UQ);
#else
      uint64_t some = 0;
      for (size_t k = 0; k < left; ++k)
        some |= static_cast<uint64_t>(!(x[i + j + k] < least[i + j + k])) << k;
#endif
      word |= some << j;
    }
    set[i / 64] = word;
  }
}

size_t collect(const float* x, size_t n, uint64_t* set) {
  size_t count = 0;
  for (size_t i = 0; i < n; i += 64) {
    uint64_t word = 0;
    for (size_t j = 0; j < 64 && i + j < n; j += 16) {
      size_t left = n - i - j < 16 ? n - i - j : 16;
#if defined(__AVX512F__)
      auto valid = static_cast<__mmask16>((1u << left) - 1);
      __m512 values = _mm512_maskz_loadu_ps(valid, x + i + j);
      uint64_t some = _mm512_mask_cmp_ps_mask(valid, values, _mm512_setzero_ps(), _CMP_NEQ_UQ);
#else
      uint64_t some = 0;
      for (size_t k = 0; k < left; ++k) some |= static_cast<uint64_t>(x[i + j + k] != 0.0f) << k;
#endif
      word |= some << j;
    }
    set[i / 64] = word;
    count += static_cast<size_t>(__builtin_popcountll(word));
  }
  return count;
}

}  // namespace
}  // namespace relufy::RELUFY_KERNELS
