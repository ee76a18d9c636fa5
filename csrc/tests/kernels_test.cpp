// Each kernel of each instruction set against a naive version in double; and the contract: the same bits
// whatever the number of tokens, the rows computed together, and whether zeros are skipped or added.
#include "kernels.h"

#include <cstring>
#include <numeric>

#include "check.h"

using namespace relufy;

namespace {

using Floats = std::vector<float>;

bool is_close(double a, double b, double scale = 1.0) {
  return std::abs(a - b) <= 1e-5 * (scale + std::abs(b));
}

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void test_dot_rows(const Kernels& k) {
  for (size_t stride : {16, 32, 48, 80, 192})
    for (size_t rows : {1, 3, 4, 7, 9})
      for (size_t tokens : {1, 2, 3, 5}) {
        Floats w = random_floats(rows * stride, 1), x = random_floats(tokens * stride, 2), y(tokens * rows);
        k.dot_rows(w.data(), stride, rows, x.data(), stride, tokens, y.data(), rows);
        for (size_t t = 0; t < tokens; ++t)
          for (size_t r = 0; r < rows; ++r) {
            double sum = 0;
            for (size_t i = 0; i < stride; ++i) sum += double(w[r * stride + i]) * x[t * stride + i];
            CHECK(is_close(y[t * rows + r], sum, 10));
            float alone;
            k.dot_rows(&w[r * stride], stride, 1, &x[t * stride], stride, 1, &alone, 1);
            CHECK(std::memcmp(&alone, &y[t * rows + r], sizeof alone) == 0);
          }
      }
}

std::vector<uint32_t> all_of(size_t n) {
  std::vector<uint32_t> list(n);
  std::iota(list.begin(), list.end(), 0u);
  return list;
}

void test_sum_columns(const Kernels& k) {
  for (size_t width : {16, 48, 256})
    for (size_t inputs : {1, 5, 68})
      for (size_t tokens : {1, 2, 3, 17}) {
        size_t stride = width + 32, part = 16;
        Floats w = random_floats(inputs * stride, 3), x = random_floats(tokens * inputs, 4, 0.6);
        Floats skipped(tokens * width, 7.0f), dense(tokens * width, 8.0f), alone(width);
        std::vector<uint32_t> list(inputs + 1), all = all_of(inputs);
        uint64_t nonzeros = 0;
        size_t listed = k.list_active(x.data(), inputs, tokens, inputs, list.data(), &nonzeros);
        k.sum_columns(w.data(), stride, width, list.data(), listed, x.data(), inputs, tokens, skipped.data(),
                      width);
        for (size_t first = 0; first < width; first += part)  // as threads would share the outputs out
          k.sum_columns(&w[first], stride, part, all.data(), inputs, x.data(), inputs, tokens, &dense[first],
                        width);
        CHECK(same_bits(skipped, dense));
        for (size_t t = 0; t < tokens; ++t) {
          for (size_t j = 0; j < width; ++j) {
            double sum = 0;
            for (size_t i = 0; i < inputs; ++i) sum += double(x[t * inputs + i]) * w[i * stride + j];
            CHECK(is_close(dense[t * width + j], sum, 10));
          }
          k.sum_columns(w.data(), stride, width, list.data(), listed, &x[t * inputs], inputs, 1, alone.data(),
                        width);
          CHECK(std::memcmp(alone.data(), &dense[t * width], width * sizeof(float)) == 0);
        }
      }
}

void test_neurons(const Kernels& k) {
  for (size_t stride : {16, 80})
    for (size_t neurons : {1, 6, 33})
      for (size_t tokens : {1, 2, 17}) {
        Floats bundle = random_floats(neurons * 2 * stride, 5), x = random_floats(tokens * stride, 6);
        Floats g = random_floats(tokens * neurons, 7, 0.7);
        Floats skipped(tokens * stride), dense(tokens * stride);
        std::vector<uint32_t> list(neurons + 1);
        uint64_t nonzeros = 0;
        size_t listed = k.list_active(g.data(), neurons, tokens, neurons, list.data(), &nonzeros);
        k.neurons(bundle.data(), stride, list.data(), listed, g.data(), neurons, x.data(), stride, tokens,
                  false, skipped.data(), stride);
        k.neurons(bundle.data(), stride, all_of(neurons).data(), neurons, g.data(), neurons, x.data(), stride,
                  tokens, true, dense.data(), stride);
        Floats zero(tokens * stride), sum_skipped = zero, sum_dense = zero;
        k.add_partials(skipped.data(), 0, 1, skipped.size(), sum_skipped.data());
        k.add_partials(dense.data(), 0, 1, dense.size(), sum_dense.data());
        CHECK(same_bits(sum_skipped, sum_dense));
        for (size_t t = 0; t < tokens; ++t)
          for (size_t j = 0; j < stride; ++j) {
            double sum = 0;
            for (size_t i = 0; i < neurons; ++i) {
              double up = 0;
              for (size_t c = 0; c < stride; ++c)
                up += double(bundle[i * 2 * stride + c]) * x[t * stride + c];
              sum += g[t * neurons + i] * up * bundle[i * 2 * stride + stride + j];
            }
            CHECK(is_close(dense[t * stride + j], sum, 100));
          }
      }
}

void test_list_active(const Kernels& k) {
  Floats x = {0, 1, 0, -2, 0, -0.0f, 0, 0, 0, 3};  // two tokens of five
  std::vector<uint32_t> list(6);
  uint64_t nonzeros = 10;
  CHECK(k.list_active(x.data(), 5, 2, 5, list.data(), &nonzeros) == 3);
  CHECK(list[0] == 1 && list[1] == 3 && list[2] == 4);
  CHECK(nonzeros == 13);
}

void test_activations(const Kernels& k) {
  Floats x = random_floats(64, 8);
  x[0] = -100.0f, x[1] = 100.0f, x[2] = 0.0f;
  for (float shift : {0.0f, 0.75f})
    for (Activation activation : {Activation::silu, Activation::relu, Activation::relu2}) {
      Floats y = x;
      k.activate(activation, shift, y.data(), y.size());
      for (size_t i = 0; i < x.size(); ++i) {
        double z = double(x[i] - shift), relu = z > 0 ? z : 0;
        double expected = activation == Activation::silu   ? z / (1 + std::exp(-z))
                          : activation == Activation::relu ? relu
                                                           : relu * relu;
        CHECK(std::abs(y[i] - expected) <= 2e-7 * std::abs(expected) + 1e-30);
      }
    }
  Floats nan(16, std::nanf(""));
  k.activate(Activation::relu, 0.0f, nan.data(), nan.size());
  CHECK(std::isnan(nan[0]));
}

void test_norm(const Kernels& k) {
  size_t n = 68;
  Floats x = random_floats(padded(n), 9), weight = random_floats(padded(n), 10), y(padded(n), 9.0f);
  std::fill(x.begin() + n, x.end(), 0.0f);
  std::fill(weight.begin() + n, weight.end(), 0.0f);
  k.rms_norm(x.data(), weight.data(), 1e-5f, n, y.data());
  double squares = 0;
  for (size_t i = 0; i < n; ++i) squares += double(x[i]) * x[i];
  for (size_t i = 0; i < n; ++i) CHECK(is_close(y[i], x[i] / std::sqrt(squares / n + 1e-5) * weight[i]));
  for (size_t i = n; i < padded(n); ++i) CHECK(y[i] == 0.0f);
}

void test_attend(const Kernels& k) {
  for (size_t head_dim : {8, 22, 64})
    for (size_t length : {1, 31, 32, 33, 100}) {
      size_t num_blocks = (length + kKvBlock - 1) / kKvBlock, width = padded(head_dim);
      size_t part = kKvBlock * (head_dim + width);
      Floats cache = random_floats(num_blocks * part, 11), query = random_floats(head_dim, 12), out(head_dim);
      std::vector<const float*> blocks;
      for (size_t b = 0; b < num_blocks; ++b) blocks.push_back(&cache[b * part]);
      Floats scores(num_blocks * kKvBlock);
      k.attend(query.data(), blocks.data(), length, head_dim, 0.3f, scores.data(), out.data());
      std::vector<double> weights(length), expected(head_dim);
      double total = 0;
      for (size_t j = 0; j < length; ++j) {
        double score = 0;
        for (size_t i = 0; i < head_dim; ++i)
          score += query[i] * blocks[j / kKvBlock][i * kKvBlock + j % kKvBlock];
        total += weights[j] = std::exp(0.3 * score);
      }
      for (size_t j = 0; j < length; ++j)
        for (size_t i = 0; i < head_dim; ++i)
          expected[i] +=
              weights[j] / total * blocks[j / kKvBlock][head_dim * kKvBlock + (j % kKvBlock) * width + i];
      for (size_t i = 0; i < head_dim; ++i) CHECK(is_close(out[i], expected[i]));
    }
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
  for (const char* isa : {"portable", "avx2", "avx512"}) {
    const Kernels* k = find_kernels(isa);
    std::printf("%s: %s\n", isa, k ? "tested" : "not on this processor");
    if (!k) continue;
    test_dot_rows(*k);
    test_sum_columns(*k);
    test_neurons(*k);
    test_list_active(*k);
    test_activations(*k);
    test_norm(*k);
    test_attend(*k);
    test_rotate(*k);
  }
  CHECK(find_kernels("no such thing") == nullptr);
}
