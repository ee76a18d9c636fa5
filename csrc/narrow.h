// Floats of 16 bits, rounded to the nearest, ties to even. For what the KV cache stores.
#pragma once

#include <bit>
#include <cstdint>

namespace relufy {

inline uint16_t bf16_of(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

inline uint16_t f16_of(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return sign | 0x7E00;   // NaN
  if (magnitude >= 0x477FF000u) return sign | 0x7C00;  // 65520 and more: infinity
  if (magnitude < 0x38800000u) {                       // below 2^-14: adding 1/2 leaves multiples of 2^-24
    float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(shifted) - 0x3F000000u);
  }
  return sign | static_cast<uint16_t>((magnitude + 0xFFFu + (magnitude >> 13 & 1) - 0x38000000u) >> 13);
}

}  // namespace relufy
