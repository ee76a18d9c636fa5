// The SIMD vocabulary: everything that the kernels need to know of an instruction set.
//
// Compiler vector extensions (GCC, Clang) name the vectors; their width, a few conversions and the integer
// dot products are all that differs between instruction sets. Rows are padded to whole chunks, so no kernel
// has a tail. `a * b + c` becomes one fused multiply-add where the hardware has it (-ffp-contract=fast).
//
// The integer operations are exact, so they give the same numbers on every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define RELUFY_VECTOR_BYTES 64
#define RELUFY_MULTIPLIES_BYTES 1  // in one instruction, without saturation: dot4
#include <immintrin.h>
#elif defined(__AVX2__)
#define RELUFY_VECTOR_BYTES 32
#include <immintrin.h>
#else
#define RELUFY_VECTOR_BYTES 16
#endif
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

constexpr size_t kVectorBytes = RELUFY_VECTOR_BYTES;
constexpr size_t kLanes = kVectorBytes / sizeof(float);

#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr size_t kRegisters = 32;  // of vectors
#else
constexpr size_t kRegisters = 16;
#endif

typedef float vec __attribute__((vector_size(RELUFY_VECTOR_BYTES)));
typedef int32_t ivec __attribute__((vector_size(RELUFY_VECTOR_BYTES)));
typedef uint32_t uvec __attribute__((vector_size(RELUFY_VECTOR_BYTES)));
typedef int16_t shorts __attribute__((vector_size(RELUFY_VECTOR_BYTES)));
typedef uint16_t ushorts __attribute__((vector_size(RELUFY_VECTOR_BYTES)));
typedef uint8_t bytes_t __attribute__((vector_size(RELUFY_VECTOR_BYTES)));

template <class Vector>
inline Vector load_as(const void* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class Vector>
inline void store_as(void* p, Vector v) {
  std::memcpy(p, &v, sizeof v);
}

inline vec load(const float* p) { return load_as<vec>(p); }
inline void store(float* p, vec v) { store_as(p, v); }
inline vec broadcast(float x) { return vec{} + x; }
inline ivec broadcast(int32_t x) { return ivec{} + x; }

// The same bits in all lanes: `vec{} + x` adds, and -0 becomes 0.
inline vec broadcast(const float* p) {
#if defined(__AVX512F__)
  return (vec)_mm512_set1_ps(*p);
#elif defined(__AVX2__)
  return (vec)_mm256_set1_ps(*p);
#else
  return vec{*p, *p, *p, *p};
#endif
}

// Keeps a vector in its register, where the compiler would rather load it again for each use.
template <class Vector>
inline void hold(Vector& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

inline vec select(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
inline vec maximum(vec a, vec b) { return select(a > b, a, b); }
inline ivec maximum(ivec a, ivec b) { return a > b ? a : b; }
inline vec to_float(ivec v) { return __builtin_convertvector(v, vec); }

// The nearest integer, ties to even; |x| < 2^22.
inline ivec round_to_int(vec x) {
  const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves no room for a fraction
  return __builtin_convertvector((x + rounder) - rounder, ivec);
}

// Adds the upper half onto the lower until one lane is left: a fixed order, whatever the compiler.
inline float sum_lanes(vec v) {
#if defined(__AVX512F__)
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#elif defined(__AVX2__)
  __m256 half = (__m256)v;
#endif
#if defined(__AVX2__)
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
#else
  float lanes[kLanes];
  store(lanes, v);
  for (size_t half = kLanes / 2; half > 0; half /= 2)
    for (size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

typedef int64_t longs __attribute__((vector_size(2 * RELUFY_VECTOR_BYTES)));

inline longs to_long(ivec v) { return __builtin_convertvector(v, longs); }

inline int64_t sum_lanes(longs v) {
#if defined(__AVX512F__)
  __m512i halves[2];
  std::memcpy(halves, &v, sizeof halves);
  return _mm512_reduce_add_epi64(_mm512_add_epi64(halves[0], halves[1]));
#elif defined(__AVX2__)
  __m256i halves[2];
  std::memcpy(halves, &v, sizeof halves);
  __m256i four = _mm256_add_epi64(halves[0], halves[1]);
  __m128i two = _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
  return _mm_cvtsi128_si64(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two)));
#else
  int64_t lanes[kLanes], sum = 0;
  std::memcpy(lanes, &v, sizeof lanes);
  for (size_t i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
#endif
}

inline int64_t sum_lanes(ivec v) { return sum_lanes(to_long(v)); }

template <class Vector, class Element>
inline Element max_lanes(Vector v) {
  Element lanes[kLanes];
  store_as(lanes, v);
  Element best = lanes[0];
  for (size_t i = 1; i < kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// exp(x) within about 2 units in the last place; x is clamped to where the result is a normal float, NaN
// stays NaN. Cody-Waite reduction to |r| <= ln(2) / 2, then the Taylor polynomial of degree 7.
inline vec exp(vec x) {
  x = select(x < -87.0f, broadcast(-87.0f), x);
  x = select(x > 88.0f, broadcast(88.0f), x);
  const float rounder = 12582912.0f;
  vec n = (x * 1.44269504088896341f + rounder) - rounder;
  vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vec p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  ivec exponent = (__builtin_convertvector(n, ivec) + 127) << 23;
  return p * (vec)exponent;
}

// kLanes values of 16 bits as floats.
inline vec load_bf16(const uint16_t* p) {
  typedef uint16_t halves __attribute__((vector_size(RELUFY_VECTOR_BYTES / 2)));
  return (vec)(__builtin_convertvector(load_as<halves>(p), uvec) << 16);
}

inline vec load_f16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  // Not every compiler has a type for it. A product with 2^112 moves the exponent, of numbers below 2^-14
  // too.
  typedef uint16_t halves __attribute__((vector_size(RELUFY_VECTOR_BYTES / 2)));
  uvec bits = __builtin_convertvector(load_as<halves>(p), uvec);
  vec magnitude = (vec)((bits & 0x7FFF) << 13) * 0x1p112f;
  uvec special = (uvec)((bits & 0x7C00) == 0x7C00) & 0x7F800000;
  return (vec)((uvec)magnitude | special | (bits & 0x8000) << 16);
#endif
}

// Adds to each 32-bit lane the four products of its unsigned bytes u with its signed bytes s.
inline ivec dot4(ivec sum, bytes_t u, bytes_t s) {
#if defined(__AVX512VNNI__)
  return (ivec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s);
#elif defined(__AVX2__)
  // Even and odd bytes apart, in 16 bits: the one-step instruction saturates.
  __m256i even = _mm256_madd_epi16(_mm256_and_si256((__m256i)u, _mm256_set1_epi16(0xFF)),
                                   _mm256_srai_epi16(_mm256_slli_epi16((__m256i)s, 8), 8));
  __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16((__m256i)u, 8), _mm256_srai_epi16((__m256i)s, 8));
  return sum + (ivec)_mm256_add_epi32(even, odd);
#else
  ivec u4 = (ivec)u, s4 = (ivec)s;
  return sum + (u4 & 0xFF) * (s4 << 24 >> 24) + ((ivec)((uvec)u4 >> 8) & 0xFF) * (s4 << 16 >> 24) +
         ((ivec)((uvec)u4 >> 16) & 0xFF) * (s4 << 8 >> 24) + (ivec)((uvec)u4 >> 24) * (s4 >> 24);
#endif
}

// In each 16-bit lane, the two products of its unsigned bytes u with its signed bytes s; u <= 15, so that
// nothing saturates.
inline shorts pair_products(bytes_t u, bytes_t s) {
#if defined(__AVX512F__)
  return (shorts)_mm512_maddubs_epi16((__m512i)u, (__m512i)s);
#elif defined(__AVX2__)
  return (shorts)_mm256_maddubs_epi16((__m256i)u, (__m256i)s);
#else
  shorts u2 = (shorts)u, s2 = (shorts)s;
  return (u2 & 0xFF) * (s2 << 8 >> 8) + (u2 >> 8) * (s2 >> 8);
#endif
}

// Adds to each 32-bit lane the two products of its 16-bit halves.
inline ivec dot2(ivec sum, shorts a, shorts b) {
#if defined(__AVX512VNNI__)
  return (ivec)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sum + (ivec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__ARM_NEON)
  int32x4_t low = vmull_s16(vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
  return sum + (ivec)vpaddq_s32(low, vmull_high_s16((int16x8_t)a, (int16x8_t)b));
#else
  ivec a2 = (ivec)a, b2 = (ivec)b;
  return sum + (a2 << 16 >> 16) * (b2 << 16 >> 16) + (a2 >> 16) * (b2 >> 16);
#endif
}

// floor(a * b / 2^15 + 1/2) in each 16-bit lane.
inline shorts multiply_high_rounded(shorts a, shorts b) {
#if defined(__AVX512F__)
  return (shorts)_mm512_mulhrs_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (shorts)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b);
#else
  ivec a2 = (ivec)a, b2 = (ivec)b;
  ivec low = ((a2 << 16 >> 16) * (b2 << 16 >> 16) + (1 << 14)) >> 15;
  ivec high = ((a2 >> 16) * (b2 >> 16) + (1 << 14)) >> 15;
  return (shorts)((low & 0xFFFF) | (high << 16));
#endif
}

// kVectorBytes / 2 signed bytes, each widened to 16 bits.
inline shorts widen(const int8_t* p) {
  typedef int8_t half __attribute__((vector_size(RELUFY_VECTOR_BYTES / 2)));
  return __builtin_convertvector(load_as<half>(p), shorts);
}

#if !RELUFY_MULTIPLIES_BYTES
// kVectorBytes / 2 bytes, each widened to 16 bits; of each four the evens come first, then the odds.
inline shorts widen_as_pairs(const uint8_t* p) {
#if defined(__AVX2__)
  const __m256i order = _mm256_setr_epi8(0, -1, 2, -1, 1, -1, 3, -1, 4, -1, 6, -1, 5, -1, 7, -1,  //
                                         8, -1, 10, -1, 9, -1, 11, -1, 12, -1, 14, -1, 13, -1, 15, -1);
  return (shorts)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_as<__m128i>(p)), order);
#else
  typedef uint8_t half __attribute__((vector_size(8)));
  half bytes = load_as<half>(p);
  return __builtin_convertvector(__builtin_shufflevector(bytes, bytes, 0, 2, 1, 3, 4, 6, 5, 7), shorts);
#endif
}
#endif

// The 16-bit lanes of a and b in turns, in order: 32-bit lanes 0, 1, ... of out[0], then of out[1].
inline void zip(shorts a, shorts b, ivec out[2]) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7,
                                         38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  out[0] = (ivec)_mm512_permutex2var_epi16((__m512i)a, first, (__m512i)b);
  out[1] = (ivec)_mm512_permutex2var_epi16((__m512i)a, second, (__m512i)b);
#else
  int16_t pairs[4 * kLanes], left[2 * kLanes], right[2 * kLanes];
  store_as(left, a);
  store_as(right, b);
  for (size_t i = 0; i < 2 * kLanes; ++i) pairs[2 * i] = left[i], pairs[2 * i + 1] = right[i];
  out[0] = load_as<ivec>(pairs);
  out[1] = load_as<ivec>(pairs + 2 * kLanes);
#endif
}

// The bytes of four rows, side by side: within each 16 bytes of a row, out[k] has in its i-th 32-bit lane the
// four rows' bytes 4 k + i.
inline void interleave4(bytes_t a, bytes_t b, bytes_t c, bytes_t d, bytes_t out[4]) {
#if defined(__AVX512F__)
  __m512i ab = _mm512_unpacklo_epi8((__m512i)a, (__m512i)b),
          AB = _mm512_unpackhi_epi8((__m512i)a, (__m512i)b);
  __m512i cd = _mm512_unpacklo_epi8((__m512i)c, (__m512i)d),
          CD = _mm512_unpackhi_epi8((__m512i)c, (__m512i)d);
  out[0] = (bytes_t)_mm512_unpacklo_epi16(ab, cd);
  out[1] = (bytes_t)_mm512_unpackhi_epi16(ab, cd);
  out[2] = (bytes_t)_mm512_unpacklo_epi16(AB, CD);
  out[3] = (bytes_t)_mm512_unpackhi_epi16(AB, CD);
#elif defined(__AVX2__)
  __m256i ab = _mm256_unpacklo_epi8((__m256i)a, (__m256i)b),
          AB = _mm256_unpackhi_epi8((__m256i)a, (__m256i)b);
  __m256i cd = _mm256_unpacklo_epi8((__m256i)c, (__m256i)d),
          CD = _mm256_unpackhi_epi8((__m256i)c, (__m256i)d);
  out[0] = (bytes_t)_mm256_unpacklo_epi16(ab, cd);
  out[1] = (bytes_t)_mm256_unpackhi_epi16(ab, cd);
  out[2] = (bytes_t)_mm256_unpacklo_epi16(AB, CD);
  out[3] = (bytes_t)_mm256_unpackhi_epi16(AB, CD);
#else
  bytes_t ab = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  bytes_t AB = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  bytes_t cd = __builtin_shufflevector(c, d, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  bytes_t CD = __builtin_shufflevector(c, d, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  out[0] = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23);
  out[1] = __builtin_shufflevector(ab, cd, 8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31);
  out[2] = __builtin_shufflevector(AB, CD, 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23);
  out[3] = __builtin_shufflevector(AB, CD, 8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31);
#endif
}

#if defined(__AVX512F__)
inline ivec unpack_low32(ivec a, ivec b) { return (ivec)_mm512_unpacklo_epi32((__m512i)a, (__m512i)b); }
inline ivec unpack_high32(ivec a, ivec b) { return (ivec)_mm512_unpackhi_epi32((__m512i)a, (__m512i)b); }
inline ivec unpack_low64(ivec a, ivec b) { return (ivec)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b); }
inline ivec unpack_high64(ivec a, ivec b) { return (ivec)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
inline ivec unpack_low32(ivec a, ivec b) { return (ivec)_mm256_unpacklo_epi32((__m256i)a, (__m256i)b); }
inline ivec unpack_high32(ivec a, ivec b) { return (ivec)_mm256_unpackhi_epi32((__m256i)a, (__m256i)b); }
inline ivec unpack_low64(ivec a, ivec b) { return (ivec)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b); }
inline ivec unpack_high64(ivec a, ivec b) { return (ivec)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b); }
#endif

// Lane K of each 16 bytes, of four rows, side by side, each 16 bytes in their place.
#if defined(__AVX512F__) || defined(__AVX2__)
template <size_t K>
inline ivec column_of_four(const ivec rows[4]) {
  ivec half01 = K < 2 ? unpack_low32(rows[0], rows[1]) : unpack_high32(rows[0], rows[1]);
  ivec half23 = K < 2 ? unpack_low32(rows[2], rows[3]) : unpack_high32(rows[2], rows[3]);
  return K % 2 == 0 ? unpack_low64(half01, half23) : unpack_high64(half01, half23);
}
#endif

// Calls function(c, column) for the columns c = K, K + 4, ... of kLanes rows: lane r of it is lane c of
// rows[r].
template <size_t K, class Function>
inline __attribute__((always_inline)) void for_each_fourth_column(const ivec rows[kLanes],
                                                                  Function&& function) {
#if defined(__AVX512F__)
  __m512i a = (__m512i)column_of_four<K>(rows), b = (__m512i)column_of_four<K>(rows + 4),
          c = (__m512i)column_of_four<K>(rows + 8), d = (__m512i)column_of_four<K>(rows + 12);
  __m512i even_ab = _mm512_shuffle_i32x4(a, b, 0x88), odd_ab = _mm512_shuffle_i32x4(a, b, 0xDD);
  __m512i even_cd = _mm512_shuffle_i32x4(c, d, 0x88), odd_cd = _mm512_shuffle_i32x4(c, d, 0xDD);
  function(K, (ivec)_mm512_shuffle_i32x4(even_ab, even_cd, 0x88));
  function(4 + K, (ivec)_mm512_shuffle_i32x4(odd_ab, odd_cd, 0x88));
  function(8 + K, (ivec)_mm512_shuffle_i32x4(even_ab, even_cd, 0xDD));
  function(12 + K, (ivec)_mm512_shuffle_i32x4(odd_ab, odd_cd, 0xDD));
#elif defined(__AVX2__)
  __m256i a = (__m256i)column_of_four<K>(rows), b = (__m256i)column_of_four<K>(rows + 4);
  function(K, (ivec)_mm256_permute2x128_si256(a, b, 0x20));
  function(4 + K, (ivec)_mm256_permute2x128_si256(a, b, 0x31));
#else
  function(K, ivec{rows[0][K], rows[1][K], rows[2][K], rows[3][K]});
#endif
}

template <class Function>
inline __attribute__((always_inline)) void for_each_column(const ivec rows[kLanes], Function&& function) {
  for_each_fourth_column<0>(rows, function);
  for_each_fourth_column<1>(rows, function);
  for_each_fourth_column<2>(rows, function);
  for_each_fourth_column<3>(rows, function);
}

// The scales of the 32-bit lanes of half a chunk of int4: k[0] in the even lanes, k[1] in the odd ones, each
// as two numbers of 16 bits.
inline shorts alternate(const int8_t* k) {
#if defined(__AVX512F__)
  const __m512i high_bytes = _mm512_set1_epi64(static_cast<long long>(0x0180018000800080u));
  return (shorts)_mm512_srai_epi16(_mm512_shuffle_epi8(_mm512_set1_epi16(load_as<short>(k)), high_bytes), 8);
#elif defined(__AVX2__)
  const __m256i high_bytes = _mm256_set1_epi64x(static_cast<long long>(0x0180018000800080u));
  return (shorts)_mm256_srai_epi16(_mm256_shuffle_epi8(_mm256_set1_epi16(load_as<short>(k)), high_bytes), 8);
#else
  shorts v;
  for (size_t i = 0; i < 2 * kLanes; ++i) v[i] = k[i / 2 % 2];
  return v;
#endif
}

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }  // past the first cache

inline bytes_t low_nibbles(bytes_t v) { return v & 0x0F; }
inline bytes_t high_nibbles(bytes_t v) { return (bytes_t)((shorts)((ivec)((uvec)v >> 4))) & 0x0F; }

}  // namespace
