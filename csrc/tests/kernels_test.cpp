// Each kernel of each instruction set against a naive version; and the contract: the same bits whatever the
// number of tokens, the rows computed together, the ranges that threads take, and whether zeros are skipped.
#include "kernels.h"

#include <cstring>
#include <numeric>

#include "narrow.h"
#include "stored_matrix.h"

namespace {

using Floats = std::vector<float>;

constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::bf16, Dtype::int8, Dtype::int4};

bool is_close(double a, double b, double scale = 1.0) {
  return std::abs(a - b) <= 1e-5 * (scale + std::abs(b));
}

// Token vectors of n entries, padded with zeros, with their quantised form.
struct Tokens {
  size_t n, stride, count;
  Floats x, scale, tiles;
  std::vector<int8_t> high, low;
  std::vector<int16_t> pairs, groups;
  std::vector<int64_t> sum;

  Tokens(const Kernels& k, size_t n_, size_t count_, uint32_t seed, double zeros = 0)
      : n(n_),
        stride(padded(n_)),
        count(count_),
        x(count * stride),
        scale(count),
        tiles((count / kTileTokens + 1) * tile_size(stride)),
        high(count * stride),
        low(count * stride),
        pairs(count * stride),
        groups(2 * count * stride),
        sum(count) {
    for (size_t t = 0; t < count; ++t) {
      Floats values = random_floats(n, seed + static_cast<uint32_t>(t), zeros);
      std::copy(values.begin(), values.end(), &x[t * stride]);
      k.quantise(&x[t * stride], stride, &high[t * stride], &low[t * stride], &pairs[t * stride],
                 &groups[2 * t * stride], &scale[t], &sum[t]);
    }
    for (size_t t = 0, tile = 0; t < count; t += kTileTokens, ++tile)
      k.interleave(&x[t * stride], stride, std::min(kTileTokens, count - t), stride,
                   &tiles[tile * tile_size(stride)]);
  }

  Input input(size_t t = 0) const {
    return {&x[t * stride],
            stride,
            &high[t * stride],
            &low[t * stride],
            &pairs[t * stride],
            &groups[2 * t * stride],
            &scale[t],
            &sum[t],
            t == 0 ? tiles.data() : nullptr};
  }
  Floats token(size_t t) const { return Floats(&x[t * stride], &x[t * stride] + n); }
};

double naive_dot(const StoredMatrix& w, size_t row, const Floats& x) {
  double sum = 0, scale;
  if (!is_integer(w.dtype)) {
    for (size_t i = 0; i < x.size(); ++i) sum += w.values[row][i] * x[i];
    return sum;
  }
  std::vector<int64_t> q = quantised(x, scale);
  for (size_t i = 0; i < x.size(); ++i) sum += static_cast<double>(q[i] * w.groups[row][i] * w.units[row][i]);
  return sum * scale * w.scales[row];
}

// Memory that starts at a cache line.
struct Scratch {
  std::vector<uint8_t> bytes;
  explicit Scratch(size_t size) : bytes(size + 64) {}
  void* get() { return bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64); }
};

// Every form of a product against the naive one, and against itself for one token and one row alone.
void test_dot(const Kernels& k, Dtype dtype, size_t n, size_t rows, size_t tokens) {
  StoredMatrix w(dtype, rows, n, 1);
  Tokens x(k, n, tokens, 2);
  Scratch scratch(dot_scratch(n, tokens));
  double unit = is_integer(dtype) ? 50 : 10;  // an input may fall on the other side of a half
  Floats y(tokens * rows), listed(tokens * rows, 7.0f), alone(rows);
  k.dot(w.view(), nullptr, 0, rows, x.input(), tokens, scratch.get(), y.data(), rows);
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t r = 0; r < rows; ++r) {
      if (t % 8 < 2 || t + 1 == tokens)
        CHECK(is_close(y[t * rows + r], naive_dot(w, r, x.token(t)), std::sqrt(double(n)) * unit));
      k.dot(w.view(), nullptr, r, 1, x.input(t), 1, scratch.get(), alone.data(), 0);
    }
    CHECK(std::memcmp(alone.data(), &y[t * rows], rows * sizeof(float)) == 0);
  }
  std::vector<uint32_t> odd;
  for (uint32_t r = 1; r < rows; r += 2) odd.push_back(r);
  k.dot(w.view(), odd.data(), 0, odd.size(), x.input(), tokens, scratch.get(), listed.data(), rows);
  for (size_t i = 0; i < listed.size(); ++i) CHECK(listed[i] == (i % rows % 2 ? y[i] : 7.0f));
}

void test_dot(const Kernels& k, Dtype dtype) {
  for (size_t n : {1, 31, 64, 68, 129, 257, 640})
    for (size_t rows : {1, 3, 4, 9})
      for (size_t tokens : {1, 2, 3, 5, 8, 17}) test_dot(k, dtype, n, rows, tokens);
  for (size_t tokens : {2, 5, 33, 61, 128}) test_dot(k, dtype, 1100, 131, tokens);
  test_dot(k, dtype, 2600, 67, 33);
  if (is_integer(dtype)) return;
  for (size_t n : {2600, 5200, 9000}) test_dot(k, dtype, n, 67, 65);  // panels whole, in halves, in quarters
  for (size_t n : {1, 31, 48, 192, 640})
    for (size_t tokens : {24, 29, 47}) test_dot(k, dtype, n, 67, tokens);
}

// All weights the least (-127 or -8) or the largest (127 or 7), int4's groups and the inputs at their most.
int64_t fill_with_extremes(StoredMatrix& w, bool largest) {
  bool is_int8 = w.dtype == Dtype::int8;
  std::fill(w.bytes.begin(), w.bytes.end(), static_cast<uint8_t>(largest ? 255 : is_int8 ? 1 : 0));
  StoredRows view = w.view();
  for (size_t r = 0; !is_int8 && r < w.rows; ++r)
    std::fill_n(&w.bytes[r * view.stride + view.width() / 2], view.width() / 32, uint8_t{127});
  if (is_int8) return largest ? 127 : -127;
  return (largest ? 7 : -8) * 127;
}

// The largest sums that rows, inputs and weights can make are still exact.
void test_large_sums(const Kernels& k, Dtype dtype, bool largest) {
  constexpr size_t kInputs = 4096, kRows = 3, kTokens = 17;
  StoredMatrix w(dtype, kRows, kInputs, 1);
  int64_t weight = fill_with_extremes(w, largest);
  StoredRows view = w.view();
  Tokens x(k, kInputs, kTokens, 2);
  Floats y(kTokens * kRows), alone(kRows);
  Scratch scratch(dot_scratch(kInputs, kTokens));
  std::fill(x.x.begin(), x.x.end(), -1.0f);
  for (size_t t = 0; t < kTokens; ++t)
    k.quantise(&x.x[t * x.stride], x.stride, &x.high[t * x.stride], &x.low[t * x.stride],
               &x.pairs[t * x.stride], &x.groups[2 * t * x.stride], &x.scale[t], &x.sum[t]);
  k.dot(view, nullptr, 0, kRows, x.input(), kTokens, scratch.get(), y.data(), kRows);
  k.dot(view, nullptr, 0, kRows, x.input(), 1, scratch.get(), alone.data(), 0);
  for (size_t i = 0; i < y.size(); ++i) {
    CHECK(y[i] == alone[i % kRows]);
    CHECK(is_close(y[i], double(-weight) * kInputs * w.scales[i % kRows], 0));
  }
}

// The same of listed rows' sums, by one token and by several.
void test_large_scatter(const Kernels& k, Dtype dtype, bool largest) {
  constexpr size_t kInputs = 700, kOutputs = 160, kTokens = 5;
  StoredMatrix w(dtype, kInputs, kOutputs, 1);
  int64_t weight = fill_with_extremes(w, largest);
  std::fill(w.scales.begin(), w.scales.end(), 0.5f);
  std::vector<uint32_t> list(kInputs + 16);
  std::iota(list.begin(), list.end(), 0u);
  Floats x(kTokens * padded(kInputs), -1.0f);
  Scratch scratch(scatter_scratch(kInputs, kTokens));
  size_t width = w.view().width();
  for (size_t tokens : {size_t{1}, kTokens}) {
    Floats y(tokens * width);
    k.scatter(w.view(), 0, width, list.data(), kInputs, x.data(), padded(kInputs), tokens, scratch.get(),
              y.data(), width);
    for (size_t t = 0; t < tokens; ++t)
      for (size_t j = 0; j < kOutputs; ++j)
        CHECK(is_close(y[t * width + j], -0.5 * double(weight) * kInputs, 0));
  }
}

// What the listed rows add to output j, and the size of the terms.
double naive_scatter(const StoredMatrix& w, const Floats& x, size_t j, double& size) {
  double sum = 0, scale;
  size = 0;
  for (size_t i = 0; i < w.rows; ++i) size += std::abs(x[i] * w.values[i][j]);
  if (!is_integer(w.dtype)) {
    for (size_t i = 0; i < w.rows; ++i) sum += w.values[i][j] * x[i];
    return sum;
  }
  Floats products(w.rows);
  for (size_t i = 0; i < w.rows; ++i) products[i] = x[i] * w.scales[i];
  std::vector<int64_t> q = quantised(products, scale);
  for (size_t i = 0; i < w.rows; ++i) {
    int64_t coefficient = w.dtype == Dtype::int8 ? q[i] : (q[i] * w.groups[i][j] + 64) >> 7;
    sum += static_cast<double>(coefficient * w.units[i][j]);
  }
  return sum * scale * (w.dtype == Dtype::int8 ? 1.0 : 128.0);
}

void test_scatter(const Kernels& k, Dtype dtype, size_t outputs, size_t inputs, size_t tokens, double zeros) {
  StoredMatrix w(dtype, inputs, outputs, 3);
  size_t width = w.view().width(), stride = padded(outputs);
  Tokens x(k, inputs, tokens, 4, zeros);
  Floats skipped(tokens * stride, 7.0f), dense(tokens * stride, 8.0f), alone(stride);
  std::vector<uint32_t> list(inputs + 16), all(inputs);
  std::iota(all.begin(), all.end(), 0u);
  Scratch scratch(scatter_scratch(inputs, tokens));
  uint64_t nonzeros = 0;
  size_t listed = k.list_active(x.x.data(), x.stride, tokens, inputs, list.data(), &nonzeros);
  k.scatter(w.view(), 0, width, list.data(), listed, x.x.data(), x.stride, tokens, scratch.get(),
            skipped.data(), stride);
  for (size_t first = 0; first < width; first += kPadding)  // as threads would share the outputs out
    k.scatter(w.view(), first, std::min(kPadding, width - first), all.data(), inputs, x.x.data(), x.stride,
              tokens, scratch.get(), &dense[first], stride);
  for (size_t t = 0; t < tokens; ++t) {
    CHECK(std::memcmp(&skipped[t * stride], &dense[t * stride], width * sizeof(float)) == 0);
    for (size_t j = 0; (t % 8 < 2 || t + 1 == tokens) && j < outputs; j += outputs > 1000 ? 37 : 1) {
      double size, expected = naive_scatter(w, x.token(t), j, size);
      // A coefficient may fall on the other side of a half: one of its 32512 units more or less.
      double unit = is_integer(dtype) ? size * 1e-4 : 0.0;
      CHECK(std::abs(dense[t * stride + j] - expected) <= 1e-5 * (size + 1) + unit);
    }
    k.scatter(w.view(), 0, width, list.data(), listed, &x.x[t * x.stride], 0, 1, scratch.get(), alone.data(),
              0);
    CHECK(std::memcmp(alone.data(), &dense[t * stride], width * sizeof(float)) == 0);
  }
}

void test_scatter(const Kernels& k, Dtype dtype) {
  for (size_t outputs : {1, 65, 128, 300})
    for (size_t inputs : {1, 5, 8, 68})
      for (size_t tokens : {1, 2, 3, 5, 8, 17}) test_scatter(k, dtype, outputs, inputs, tokens, 0.6);
  for (double zeros : {0.0, 0.5, 0.97, 1.0})
    for (size_t tokens : {1, 17}) test_scatter(k, dtype, 80, 70, tokens, zeros);
  for (size_t tokens : {1, 5, 17}) test_scatter(k, dtype, 4500, 68, tokens, 0.6);
  test_scatter(k, dtype, 1300, 1050, 33, 0.6);  // more rows than a block has
  test_scatter(k, dtype, 140, 300, 128, 0.9);
}

void test_expand(const Kernels& k, Dtype dtype) {
  StoredMatrix w(dtype, 3, 200, 5);
  Floats y(padded(200), 9.0f);
  k.expand(w.view(), 1, y.data());
  for (size_t i = 0; i < y.size(); ++i) CHECK(is_close(y[i], i < 200 ? w.values[1][i] : 0.0, 0));
}

void test_quantise(const Kernels& k) {
  Tokens x(k, 200, 1, 6, 0.3);
  double scale;
  std::vector<int64_t> q = quantised(x.token(0), scale);
  int64_t total = 0, groups[8] = {};
  for (size_t i = 0; i < 200; ++i) {
    int64_t found = 256 * x.high[i] + x.low[i];
    CHECK(std::abs(found - q[i]) <= 1 && std::abs(found) <= kMostQuantised);
    CHECK((x.x[i] == 0.0f) <= (found == 0));
    total += found;
    groups[i / 128 * 4 + i % 128 / 64 * 2 + i / 4 % 2] += found;
  }
  for (size_t i = 0; i < 200; ++i) {  // evens first
    size_t place = i / 4 * 4 + i % 2 * 2 + i % 4 / 2;
    CHECK(x.pairs[place] == 256 * x.high[i] + x.low[i]);
  }
  CHECK(total == x.sum[0] && is_close(x.scale[0], scale, 0));
  for (size_t g = 0; g < 8; ++g) CHECK(groups[g] == 1024 * x.groups[g] + x.groups[x.stride + g]);
  Floats special(kPadding, 1.0f);
  std::vector<int8_t> bytes(kPadding);
  std::vector<int16_t> sums(2 * kPadding);
  float found_scale;
  int64_t sum;
  for (float value : {INFINITY, NAN}) {  // are seen: the scale says so
    special[5] = value;
    k.quantise(special.data(), kPadding, bytes.data(), bytes.data(), sums.data(), sums.data(), &found_scale,
               &sum);
    CHECK(!std::isfinite(found_scale));
  }
}

void test_list_active(const Kernels& k) {
  Floats x = {0, 1, 0, -2, 0, -0.0f, 0, 0, 0, 3};  // two tokens of five
  std::vector<uint32_t> list(5 + 16);
  uint64_t nonzeros = 10;
  CHECK(k.list_active(x.data(), 5, 2, 5, list.data(), &nonzeros) == 3);
  CHECK(list[0] == 1 && list[1] == 3 && list[2] == 4);
  CHECK(nonzeros == 13);
  Floats nan(40, std::nanf(""));
  std::vector<uint32_t> all(40 + 16);
  CHECK(k.list_active(nan.data(), 0, 1, 40, all.data(), &nonzeros) == 40 && all[39] == 39);
}

// Sets of neurons: listed, kept to, and collected, all in agreement with each other.
void test_sets(const Kernels& k) {
  for (size_t n : {1, 15, 16, 70, 128, 200})
    for (size_t count : {1, 3}) {
      size_t room = round_up(n, 16), first = 32;  // of x, which begins at neuron 32 of the sets
      std::vector<std::vector<uint64_t>> sets(count, std::vector<uint64_t>((first + room + 63) / 64, ~0ull));
      std::vector<const uint64_t*> pointers;
      size_t members = 0;
      std::vector<bool> is_member(n);
      for (size_t s = 0; s < count; ++s) {
        for (size_t i = 0; i < n; ++i)
          if ((i * 7 + s * 5) % 3)
            sets[s][(first + i) / 64] &= ~(uint64_t{1} << ((first + i) % 64));
          else
            is_member[i] = true, ++members;
        pointers.push_back(sets[s].data());
      }
      std::vector<uint32_t> list(n + 16);
      uint64_t found = 5;
      size_t listed = k.list_members(pointers.data(), count, first, n, list.data(), &found);
      CHECK(found == members + 5);
      for (size_t i = 0, j = 0; i < n; ++i)
        if (is_member[i]) CHECK(j < listed && list[j++] == i);
      CHECK(listed == static_cast<size_t>(std::count(is_member.begin(), is_member.end(), true)));

      Floats x(room, 2.0f);
      k.keep_members(pointers[0], first, room, x.data());
      for (size_t i = 0; i < n; ++i) CHECK(x[i] == (i * 7 % 3 ? 0.0f : 2.0f));
      std::vector<uint64_t> collected((n + 63) / 64, ~0ull);
      CHECK(k.collect(x.data(), n, collected.data()) == (n + 2) / 3);
      for (size_t i = 0; i < 64 * collected.size(); ++i)
        CHECK((collected[i / 64] >> (i % 64) & 1) == (i < n && i * 7 % 3 == 0));
    }
  Floats special{-0.0f, std::nanf(""), 1e-42f, 0.0f, -1.0f};
  uint64_t set = 0;
  CHECK(k.collect(special.data(), 5, &set) == 3 && set == 0b10110);
  k.keep_members(&set, 0, 0, special.data());
  Floats nan(16, std::nanf(""));
  set = 0b10;
  k.keep_members(&set, 0, 16, nan.data());
  for (size_t i = 0; i < 16; ++i) CHECK(i == 1 ? std::isnan(nan[i]) : nan[i] == 0.0f);
}

// What reaches its own limit is in the set; an equal score is, and so is one that is no number.
void test_reach(const Kernels& k) {
  for (size_t n : {1, 15, 16, 70, 128, 200}) {
    Floats x(n), least(n);
    for (size_t i = 0; i < n; ++i) {
      x[i] = static_cast<float>(i * 7 % 5) - 2;
      least[i] = static_cast<float>(i * 3 % 4) - 2;
    }
    x[n / 2] = std::nanf("");
    std::vector<uint64_t> set((n + 63) / 64, ~0ull);
    k.reach(x.data(), least.data(), n, set.data());
    for (size_t i = 0; i < 64 * set.size(); ++i)
      CHECK((set[i / 64] >> (i % 64) & 1) == (i < n && !(x[i] < least[i])));
  }
}

double activation_of(Activation activation, double z) {
  double relu = z > 0 ? z : 0;
  switch (activation) {
    case Activation::silu:
      return z / (1 + std::exp(-z));
    case Activation::relu:
      return relu;
    case Activation::relu2:
      return relu * relu;
    case Activation::gelu:
      return 0.5 * z * (1 + std::erf(z / std::sqrt(2.0)));
    case Activation::gelu_tanh:
      return 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
    case Activation::fatrelu:
      return z < 0.5 ? 0 : z;
  }
  return NAN;
}

void test_activations(const Kernels& k) {
  Floats x = random_floats(64, 8);
  x[0] = -100.0f, x[1] = 100.0f, x[2] = 0.0f, x[3] = 0.5f;
  for (float shift : {0.0f, 0.75f})
    for (uint32_t kind = 0; kind <= 5; ++kind) {
      auto activation = static_cast<Activation>(kind);
      bool is_gelu = activation == Activation::gelu || activation == Activation::gelu_tanh;
      Floats y = x;
      k.activate(activation, shift, 0.5f, y.data(), y.size());
      for (size_t i = 0; i < x.size(); ++i) {
        double expected = activation_of(activation, double(x[i] - shift));
        CHECK(std::abs(y[i] - expected) <= 2e-7 * std::abs(expected) + (is_gelu ? 1e-6 : 1e-30));
      }
    }
  for (uint32_t kind = 0; kind <= 5; ++kind) {
    Floats nan(16, std::nanf(""));
    k.activate(static_cast<Activation>(kind), 0.0f, 0.5f, nan.data(), nan.size());
    CHECK(std::isnan(nan[0]));
  }
}

void test_multiply(const Kernels& k) {
  Floats g = {0, -0.0f, 2, -3, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0}, u(16, 5.0f), a(16);
  u[0] = NAN, u[4] = INFINITY;  // up of neurons that were not computed
  k.multiply(g.data(), u.data(), a.data(), 16);
  CHECK(a[0] == 0 && a[1] == 0 && a[2] == 10 && a[3] == -15 && a[4] == 0 && a[5] == 5);
}

void test_norms(const Kernels& k) {
  size_t n = 68;
  Floats x = random_floats(padded(n), 9), weight = random_floats(padded(n), 10),
         bias = random_floats(padded(n), 11);
  for (Floats* v : {&x, &weight, &bias}) std::fill(v->begin() + n, v->end(), 0.0f);
  Floats y(padded(n), 9.0f), z = y;
  k.rms_norm(x.data(), weight.data(), 1e-5f, n, y.data());
  k.layer_norm(x.data(), weight.data(), bias.data(), 1e-5f, n, z.data());
  double squares = 0, sum = 0, variance = 0;
  for (size_t i = 0; i < n; ++i) squares += double(x[i]) * x[i], sum += x[i];
  for (size_t i = 0; i < n; ++i) variance += (x[i] - sum / n) * (x[i] - sum / n);
  for (size_t i = 0; i < n; ++i) {
    CHECK(is_close(y[i], x[i] / std::sqrt(squares / n + 1e-5) * weight[i]));
    CHECK(is_close(z[i], (x[i] - sum / n) / std::sqrt(variance / n + 1e-5) * weight[i] + bias[i]));
  }
  for (size_t i = n; i < padded(n); ++i) CHECK(y[i] == 0.0f && z[i] == 0.0f);
}

float half_value(uint16_t bits, Dtype dtype) {
  if (dtype == Dtype::bf16) return std::bit_cast<float>(uint32_t{bits} << 16);
  int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  double value = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return static_cast<float>(bits & 0x8000 ? -value : value);
}

// Blocks of K and V of a type, and the numbers that they hold.
struct Cache {
  size_t head_dim, part;
  Floats values;
  std::vector<uint8_t> bytes;
  std::vector<const uint8_t*> blocks;

  Cache(Dtype dtype, size_t dim, size_t num_blocks) : head_dim(dim), part(kKvBlock * (dim + kv_width(dim))) {
    values = random_floats(num_blocks * part, 11);
    size_t size = dtype == Dtype::f32 ? 4 : 2;
    bytes.resize(values.size() * size);
    for (size_t i = 0; i < values.size(); ++i) {
      uint16_t half = dtype == Dtype::bf16 ? bf16_of(values[i]) : f16_of(values[i]);
      if (dtype != Dtype::f32) values[i] = half_value(half, dtype);
      std::memcpy(&bytes[i * size], dtype == Dtype::f32 ? static_cast<void*>(&values[i]) : &half, size);
    }
    for (size_t b = 0; b < num_blocks; ++b) blocks.push_back(&bytes[b * part * size]);
  }
  float key(size_t j, size_t i) const { return values[j / kKvBlock * part + i * kKvBlock + j % kKvBlock]; }
  float value(size_t j, size_t i) const {
    return values[j / kKvBlock * part + head_dim * kKvBlock + j % kKvBlock * kv_width(head_dim) + i];
  }
};

// Ways to attend that some families have; slopes are by query.
struct Manner {
  size_t first = 0;
  float softcap = 0.0f;
  Alibi alibi = {};
};
const float kSlopes[] = {0.5f, 0.25f, 0.123f, 0.06f, 0.7f, 0.01f};
const Manner kManners[] = {{},
                           {.first = 5},
                           {.softcap = 1.5f},
                           {.first = 31, .alibi = {.slopes = kSlopes, .start = 64}},
                           {.alibi = {.slopes = kSlopes, .start = 320, .scale = 0.3f, .rounds = true}}};

double score_of(const Attention& a, double product, size_t q, size_t j) {
  double score = a.scale * product, at = static_cast<double>(a.alibi.start + j);
  if (a.softcap > 0) score = a.softcap * std::tanh(score / a.softcap);
  if (!a.alibi.slopes) return score;
  auto rounded = [](double x) {
    return std::bit_cast<float>(static_cast<uint32_t>(bf16_of(static_cast<float>(x))) << 16);
  };
  double slope = a.alibi.slopes[q];
  return score + a.alibi.scale * (a.alibi.rounds ? rounded(slope * rounded(at)) : slope * at);
}

void test_attend(const Kernels& k, Dtype dtype, const Manner& manner) {
  for (size_t head_dim : {8, 22, 64})
    for (size_t length : {1, 31, 32, 33, 100}) {
      if (manner.first >= length) continue;
      size_t num_blocks = (length + kKvBlock - 1) / kKvBlock, queries = 6;
      Cache cache(dtype, head_dim, num_blocks);
      Floats query = random_floats(queries * head_dim, 12), out(queries * head_dim), alone(head_dim);
      Floats scores(4 * num_blocks * kKvBlock);
      Attention a{cache.blocks.data(), length,         head_dim,    queries, head_dim, dtype, 0.3f,
                  manner.first,        manner.softcap, manner.alibi};
      k.attend(a, query.data(), scores.data(), out.data());
      for (size_t q = 0; q < queries; ++q) {
        std::vector<double> weights(length), expected(head_dim);
        double total = 0;
        for (size_t j = a.first; j < length; ++j) {
          double product = 0;
          for (size_t i = 0; i < head_dim; ++i) product += query[q * head_dim + i] * cache.key(j, i);
          total += weights[j] = std::exp(score_of(a, product, q, j) - score_of(a, 0, q, length));
        }
        for (size_t j = a.first; j < length; ++j)
          for (size_t i = 0; i < head_dim; ++i) expected[i] += weights[j] / total * cache.value(j, i);
        for (size_t i = 0; i < head_dim; ++i) CHECK(is_close(out[q * head_dim + i], expected[i]));
        Attention one = a;
        one.count = 1;
        if (a.alibi.slopes) one.alibi.slopes += q;
        k.attend(one, &query[q * head_dim], scores.data(), alone.data());
        CHECK(std::memcmp(alone.data(), &out[q * head_dim], head_dim * sizeof(float)) == 0);
      }
    }
}

void test_soft_cap(const Kernels& k) {
  for (size_t n : {1, 16, 37}) {
    Floats x = random_floats(n + 1, 14), y = x;
    for (float factor : {0.001f, 0.3f, 20.0f}) {
      for (size_t i = 0; i < n; ++i) y[i] = factor * x[i];
      k.soft_cap(2.0f, y.data(), n);
      for (size_t i = 0; i < n; ++i)
        CHECK(std::fabs(y[i] - 2 * std::tanh(double(factor) * x[i] / 2)) <= 1e-6 * std::fabs(factor * x[i]));
      CHECK(y[n] == x[n]);
    }
  }
}

// The one value that one position gives: every finite number of 16 bits is read as what it is.
void test_reads_f16(const Kernels& k) {
  constexpr size_t kHeadDim = 512;
  std::vector<uint16_t> block(kKvBlock * 2 * kHeadDim);
  auto part = reinterpret_cast<const uint8_t*>(block.data());
  Floats query(kHeadDim), scores(kKvBlock), out(kHeadDim);
  Attention a{&part, 1, kHeadDim, 1, kHeadDim, Dtype::f16, 1.0f};
  for (uint32_t first = 0; first < 0x10000; first += kHeadDim) {
    if ((first & 0x7C00) == 0x7C00) continue;
    for (size_t i = 0; i < kHeadDim; ++i) block[kKvBlock * kHeadDim + i] = static_cast<uint16_t>(first + i);
    k.attend(a, query.data(), scores.data(), out.data());
    for (size_t i = 0; i < kHeadDim; ++i)
      CHECK(out[i] == half_value(static_cast<uint16_t>(first + i), Dtype::f16));
  }
}

void test_narrow() {
  for (Dtype dtype : {Dtype::bf16, Dtype::f16})
    for (uint32_t bits = 0; bits < 0x7C00;
         ++bits) {  // every number comes back, and halves go to the even one
      auto narrow = [&](float x) { return dtype == Dtype::bf16 ? bf16_of(x) : f16_of(x); };
      auto half = static_cast<uint16_t>(bits);
      float value = half_value(half, dtype);
      CHECK(narrow(value) == half && narrow(-value) == (half | 0x8000));
      if (bits + 1 == 0x7C00) continue;
      double next = half_value(static_cast<uint16_t>(bits + 1), dtype), middle = (value + next) / 2;
      CHECK(narrow(static_cast<float>(middle)) == (bits + (bits & 1)));
    }
  CHECK(f16_of(1e6f) == 0x7C00 && std::isnan(std::bit_cast<float>(uint32_t{bf16_of(NAN)} << 16)));
}

void test_rotate(const Kernels& k) {
  size_t head_dim = 22, half = head_dim / 2;
  Floats head = random_floats(head_dim, 13), cosine(half), sine(half), rotated = head;
  for (size_t i = 0; i < half; ++i) cosine[i] = std::cos(0.1f * i), sine[i] = std::sin(0.1f * i);
  k.rotate(cosine.data(), sine.data(), head_dim, rotated.data());
  for (size_t i = 0; i < half; ++i) {
    CHECK(is_close(rotated[i], double(head[i]) * cosine[i] - double(head[i + half]) * sine[i]));
    CHECK(is_close(rotated[i + half], double(head[i + half]) * cosine[i] + double(head[i]) * sine[i]));
  }
}

}  // namespace

int main() {
  for (const char* isa : {"portable", "neon", "avx2", "avx512"}) {
    const Kernels* k = find_kernels(isa);
    std::printf("%s: %s\n", isa, k ? "tested" : "not on this processor");
    if (!k) continue;
    for (Dtype dtype : kDtypes) {
      test_dot(*k, dtype);
      test_scatter(*k, dtype);
      test_expand(*k, dtype);
      for (bool largest : {false, true}) {
        if (!is_integer(dtype)) break;
        test_large_sums(*k, dtype, largest);
        test_large_scatter(*k, dtype, largest);
      }
    }
    for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16})
      for (const Manner& manner : kManners) test_attend(*k, dtype, manner);
    test_soft_cap(*k);
    test_reads_f16(*k);
    test_quantise(*k);
    test_list_active(*k);
    test_sets(*k);
    test_reach(*k);
    test_activations(*k);
    test_multiply(*k);
    test_norms(*k);
    test_rotate(*k);
  }
  test_narrow();
  CHECK(find_kernels("no such thing") == nullptr);
}
