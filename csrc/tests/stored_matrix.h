// Random stored rows of any type, with the numbers that they stand for; and the specification of the sums
// over integer weights: inputs scaled to 16 bits, everything else exact.
#pragma once

#include <algorithm>

#include "check.h"
#include "kernels.h"

using namespace relufy;

struct StoredMatrix {
  Dtype dtype;
  size_t rows, length;
  std::vector<uint8_t> bytes;
  std::vector<float> scales;
  std::vector<std::vector<int32_t>> units;   // integer types: w, or k and w apart
  std::vector<std::vector<int32_t>> groups;  // int4: k of each element
  std::vector<std::vector<double>> values;

  StoredMatrix(Dtype type, size_t num_rows, size_t n, uint32_t seed)
      : dtype(type), rows(num_rows), length(n) {
    stride_ = row_bytes(dtype, n);
    bytes.resize(rows * stride_ + 128);
    values.assign(rows, std::vector<double>(n));
    units.assign(rows, std::vector<int32_t>(n));
    groups.assign(rows, std::vector<int32_t>(n, 1));
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (size_t r = 0; r < rows; ++r) {
      scales.push_back(0.01f + std::abs(normal(random)) * 0.01f);
      fill_row(r, random, normal);
    }
  }

  // The vectors start at a cache line in files; here they need not.
  StoredRows view() const { return {bytes.data(), stride_, length, dtype, scales.data()}; }

 private:
  void fill_row(size_t r, std::mt19937& random, std::normal_distribution<float>& normal) {
    uint8_t* row = &bytes[r * stride_];
    size_t width = round_up(length, chunk_of(dtype));
    if (dtype == Dtype::int8) std::fill_n(row, width, 128);
    if (dtype == Dtype::int4) {
      std::fill_n(row, width / 2, 0x88);
      for (size_t g = 0; g < width / 32; ++g) row[width / 2 + g] = static_cast<uint8_t>(random() % 255 - 127);
    }
    for (size_t i = 0; i < length; ++i) put(row, width, r, i, random, normal(random));
  }

  void put(uint8_t* row, size_t width, size_t r, size_t i, std::mt19937& random, float value) {
    if (dtype == Dtype::f32) {
      std::memcpy(row + 4 * i, &value, 4);
      values[r][i] = value;
    } else if (dtype == Dtype::bf16) {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      auto half = static_cast<uint16_t>(bits >> 16);
      std::memcpy(row + (i / 32 * 16 + i % 16) * 4 + i % 32 / 16 * 2, &half, 2);
      bits = uint32_t{half} << 16;
      float kept;
      std::memcpy(&kept, &bits, 4);
      values[r][i] = kept;
    } else if (dtype == Dtype::int8) {
      units[r][i] = static_cast<int32_t>(random() % 255) - 127;
      row[i] = static_cast<uint8_t>(units[r][i] + 128);
      values[r][i] = double(scales[r]) * units[r][i];
    } else {
      units[r][i] = static_cast<int32_t>(random() % 16) - 8;
      size_t chunk = i / 128, half = i % 128 / 64, shift = 4 * half;
      uint8_t& both = row[chunk * 64 + i % 64];
      both = static_cast<uint8_t>((both & ~(0xF << shift)) | ((units[r][i] + 8) << shift));
      groups[r][i] = static_cast<int8_t>(row[width / 2 + 4 * chunk + 2 * half + i / 4 % 2]);
      values[r][i] = double(scales[r]) * groups[r][i] * units[r][i];
    }
  }

  size_t stride_;
};

inline std::vector<int64_t> quantised(const std::vector<float>& x, double& scale) {
  float largest = 0;
  for (float v : x) largest = std::max(largest, std::abs(v));
  scale = double(largest) / kMostQuantised;
  std::vector<int64_t> q;
  for (float v : x) q.push_back(scale > 0 ? std::llrint(v / scale) : 0);
  return q;
}
