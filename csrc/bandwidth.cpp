#include "bandwidth.h"

#include <algorithm>
#include <chrono>
#include <random>
#include <vector>

#include "buffer.h"
#include "thread_pool.h"

namespace relufy {
namespace {

constexpr size_t kPool = size_t{1} << 30;  // bytes of weights that a kernel is measured over
constexpr size_t kTask = size_t{1} << 20;
constexpr double kShares[] = {0.98, 0.95, 0.9, 0.85, 0.8,
                              0.7,  0.6,  0.5, 0.4,  0.3};  // as crossovers are sought

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// What was read, and how long that took.
struct Run {
  size_t bytes = 0;
  double seconds = 0.0;
};

// The median rate over `seconds`, of three runs at least, after one to warm up.
template <class Function>
double median_rate(double seconds, Function&& run) {
  std::vector<double> rates;
  run();
  for (auto begin = std::chrono::steady_clock::now(); rates.size() < 3 || seconds_since(begin) < seconds;) {
    Run r = run();
    rates.push_back(static_cast<double>(r.bytes) / r.seconds / 1e9);
  }
  std::nth_element(rates.begin(), rates.begin() + static_cast<ptrdiff_t>(rates.size() / 2), rates.end());
  return rates[rates.size() / 2];
}

Buffer<uint8_t> random_bytes(size_t count) {
  Buffer<uint8_t> bytes = make_buffer<uint8_t>(count);
  for (size_t i = 0; i + 8 <= count; i += 8) {
    uint64_t value = (i + 1) * 0x9E3779B97F4A7C15u;
    value ^= value >> 29;
    value &= 0x3FFF3FFF3FFF3FFFu;  // as floats, numbers of a middling size
    std::copy_n(reinterpret_cast<const uint8_t*>(&value), 8, &bytes[i]);
  }
  return bytes;
}

// Matrices that together fill the pool, and the vectors of one product.
class Product {
 public:
  Product(const Measured& m, size_t threads)
      : m_(m),
        length_(m.scatters ? m.rows : m.columns),
        stored_(m.scatters ? m.columns : m.rows),
        stride_(row_bytes(m.dtype, length_)),
        width_(padded(m.columns)),
        count_(std::max<size_t>(2, kPool / (stored_ * stride_))),
        weights_(random_bytes(count_ * stored_ * stride_ + 64)),
        x_(make_buffer<float>(m.tokens * width_)),
        y_(make_buffer<float>(m.tokens * padded(m.rows))),
        scales_(make_buffer<float>(padded(stored_))),
        scale_(make_buffer<float>(m.tokens)),
        high_(make_buffer<int8_t>(m.tokens * width_)),
        low_(make_buffer<int8_t>(m.tokens * width_)),
        pairs_(make_buffer<int16_t>(m.tokens * width_)),
        groups_(make_buffer<int16_t>(2 * m.tokens * width_)),
        sum_(make_buffer<int64_t>(m.tokens)),
        tiles_(make_buffer<float>(round_up_quotient(m.tokens, kTileTokens) * tile_size(width_))),
        list_(make_buffer<uint32_t>(stored_ + 16)) {
    size_t bytes = std::max(dot_scratch(m.columns, m.tokens), scatter_scratch(m.columns, m.tokens));
    for (size_t i = 0; i < threads; ++i) scratch_.push_back(make_buffer<uint8_t>(bytes));
    std::fill_n(scales_.get(), stored_, 1.0f);
  }

  // From now on a list of this share of the stored rows is read.
  void list(double density) {
    m_.density = density;
    m_.lists_outputs = !m_.scatters;
  }

  void run(ThreadPool& pool, Run& total) {
    StoredRows w{&weights_[next_++ % count_ * stored_ * stride_], stride_, length_, m_.dtype, scales_.get()};
    draw();
    auto start = std::chrono::steady_clock::now();
    m_.scatters ? scatter(w, pool) : dot(w, pool);
    total.seconds += seconds_since(start);
    total.bytes += listed_ * stride_;
  }

 private:
  void draw() {
    std::uniform_real_distribution<float> uniform;
    bool has_list = m_.scatters || m_.lists_outputs;
    listed_ = 0;
    for (size_t i = 0; i < stored_; ++i)
      if (!has_list || uniform(random_) < m_.density) list_[listed_++] = static_cast<uint32_t>(i);
    if (listed_ == 0) list_[listed_++] = 0;
    std::fill_n(x_.get(), m_.tokens * width_, 0.0f);
    for (size_t t = 0; t < m_.tokens; ++t) {
      float* x = &x_[t * width_];
      for (size_t i = 0; i < (m_.scatters ? listed_ : m_.columns); ++i)
        x[m_.scatters ? list_[i] : i] = uniform(random_) + 0.1f;
      kernels().quantise(x, width_, &high_[t * width_], &low_[t * width_], &pairs_[t * width_],
                         &groups_[2 * t * width_], &scale_[t], &sum_[t]);
    }
    for (size_t t = 0, tile = 0; t < m_.tokens; t += kTileTokens, ++tile)
      kernels().interleave(&x_[t * width_], width_, std::min(kTileTokens, m_.tokens - t), width_,
                           &tiles_[tile * tile_size(width_)]);
  }

  void dot(const StoredRows& w, ThreadPool& pool) {
    size_t rows = m_.tokens == 1 ? std::max<size_t>(1, 65536 / stride_) : 256;
    Input x{x_.get(),      width_,       high_.get(), low_.get(),  pairs_.get(),
            groups_.get(), scale_.get(), sum_.get(),  tiles_.get()};
    pool.run([&](Team& team) {
      team.for_each((listed_ + rows - 1) / rows, [&](size_t i) {
        size_t first = i * rows, count = std::min(rows, listed_ - first);
        const uint32_t* list = m_.lists_outputs ? &list_[first] : nullptr;
        kernels().dot(w, list, first, count, x, m_.tokens, scratch_[team.thread()].get(), y_.get(),
                      padded(m_.rows));
      });
    });
  }

  void scatter(const StoredRows& w, ThreadPool& pool) {
    size_t width = padded((w.width() + pool.size() - 1) / pool.size()),
           tasks = (w.width() + width - 1) / width;
    pool.run([&](Team& team) {
      team.for_each(tasks, [&](size_t i) {
        size_t first = i * width;
        kernels().scatter(w, first, std::min(width, w.width() - first), list_.get(), listed_, x_.get(),
                          width_, m_.tokens, scratch_[team.thread()].get(), &y_[first], padded(m_.rows));
      });
    });
  }

  Measured m_;
  size_t length_, stored_, stride_, width_, count_, next_ = 0, listed_ = 0;
  Buffer<uint8_t> weights_;
  Buffer<float> x_, y_, scales_, scale_;
  Buffer<int8_t> high_, low_;
  Buffer<int16_t> pairs_, groups_;
  Buffer<int64_t> sum_;
  Buffer<float> tiles_;
  Buffer<uint32_t> list_;
  std::vector<Buffer<uint8_t>> scratch_;
  std::mt19937 random_{1};
};

// GB/s, of several products a run: one alone is too short to time.
double rate(Product& product, ThreadPool& pool, double seconds) {
  return median_rate(seconds, [&] {
    Run total;
    while (total.bytes < (size_t{128} << 20)) product.run(pool, total);
    return total;
  });
}

}  // namespace

double read_bandwidth(size_t threads, size_t bytes, double seconds) {
  bytes = round_up(std::max(bytes, kTask), kTask);
  Buffer<uint8_t> memory = random_bytes(bytes);
  std::vector<uint32_t> sums(bytes / kTask);
  ThreadPool pool(threads);
  return median_rate(seconds, [&] {
    auto start = std::chrono::steady_clock::now();
    pool.run([&](Team& team) {
      team.for_each(bytes / kTask, [&](size_t i) { sums[i] = kernels().read(&memory[i * kTask], kTask); });
    });
    return Run{bytes, seconds_since(start)};
  });
}

double kernel_bandwidth(const Measured& measured, size_t threads, double seconds) {
  Product product(measured, threads);
  ThreadPool pool(threads);
  return rate(product, pool, seconds);
}

// At a share s, a list takes s / rate(s), and all rows 1 / rate(all). From the densest list on, the first
// that is faster ends the search.
double measure_crossover(Measured measured, size_t threads, double seconds) {
  measured.density = 1.0;
  measured.lists_outputs = false;
  Product product(measured, threads);
  ThreadPool pool(threads);
  double all = rate(product, pool, seconds), slower = 1.0;
  for (double share : kShares) {
    product.list(share);
    if (share / rate(product, pool, seconds) < 1.0 / all) return slower == 1.0 ? 1.0 : (share + slower) / 2;
    slower = share;
  }
  return 0.0;
}

}  // namespace relufy
