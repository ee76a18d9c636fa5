#include "reuse.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

#include "mix.h"

namespace relufy {

Reuse::Reuse(Shape shape, const ReuseSettings& settings, size_t prompt_length)
    : shape_(shape),
      settings_(settings),
      prompt_length_(prompt_length),
      start_(prompt_length),
      words_(set_words(shape.neurons)),
      set_(shape.layers * words_) {
  auto within = [](double share) { return share >= 0.0 && share <= 1.0; };
  if (settings.period == 0) throw std::invalid_argument("a period of reuse has at least one token");
  if (settings.window == 0) throw std::invalid_argument("a window of reuse has at least one token");
  if (!within(settings.share) || !within(settings.most_missed))
    throw std::invalid_argument("shares of neurons are from 0 to 1");
  if (is(Policy::prompt) && prompt_length == 0)
    throw std::invalid_argument("neurons are taken over from a prompt, and this sequence has none");
  if (is(Policy::adaptive)) limited_.resize(set_.size());
  if (is(Policy::prompt)) sums_ = std::make_shared<std::vector<float>>(shape.layers * shape.neurons);
}

std::unique_ptr<Reuse> Reuse::with(const ReuseSettings& settings, size_t length) const {
  auto copy = std::make_unique<Reuse>(shape_, settings, prompt_length_);
  copy->start_ = std::max(prompt_length_, length > 0 ? length - 1 : 0);
  copy->records_ = records_;
  copy->first_frozen_ = first_frozen_;
  copy->sums_ = sums_;
  copy->num_summed_ = num_summed_;
  bool has_all = !copy->is(Policy::prompt) || (sums_ && num_summed_ == prompt_length_);
  for (size_t i = 0; i < length; ++i) has_all = has_all && (!copy->keeps(i) || records_[i]);
  if (!has_all)
    throw std::invalid_argument("the sequence did not keep the active neurons that these settings ask for");
  return copy;
}

// ---- which tokens are open

bool Reuse::is_open(size_t position) const {
  if (position <= start_) return true;
  if (is(Policy::adaptive)) return records_[position]->is_open;
  size_t since = position - start_;
  return is(Policy::blocks) ? since / settings_.period % 2 == 0 : since % settings_.period == 0;
}

// The last open position before one that comes after the start.
size_t Reuse::last_open(size_t position) const {
  do --position;
  while (!is_open(position));
  return position;
}

// Adaptive: whether the sampled neurons say that the set has been missing too many since the last open token.
bool Reuse::decides_to_open(size_t position) const {
  size_t open = last_open(position);
  if (position - open >= settings_.period) return true;
  uint64_t sampled = 0, missed = 0;
  for (size_t i = open + 1; i < position; ++i) sampled += records_[i]->sampled, missed += records_[i]->missed;
  return static_cast<double>(missed) > settings_.most_missed * static_cast<double>(sampled);
}

// A frozen token needs what open ones before it leave; an adaptive one, what any before it leaves.
size_t Reuse::together(size_t first, size_t count) const {
  if (is(Policy::adaptive)) return first > start_ ? 1 : std::min(count, start_ - first + 1);
  bool has_open = false;
  for (size_t i = 0; i < count; ++i) {
    if (has_open && !is_open(first + i)) return i;
    has_open = has_open || is_open(first + i);
  }
  return count;
}

// ---- what a sequence's life does to it

// Whether a position's active neurons may be asked for.
bool Reuse::keeps(size_t position) const {
  if (is(Policy::prompt)) return false;
  if (is(Policy::blocks)) return position >= num_unseen() && (position <= start_ || is_open(position));
  return position >= num_unseen();
}

size_t Reuse::num_unseen() const {
  if (is(Policy::prompt)) return 0;
  if (is(Policy::blocks)) return settings_.resets ? start_ : 0;
  return start_ + 1 > settings_.window ? start_ + 1 - settings_.window : 0;
}

void Reuse::check_truncate(size_t length) const {
  if (is(Policy::prompt) && length > 0 && length < num_summed_)
    throw std::invalid_argument(
        "what neurons put out in a prompt is one sum: a sequence can go back to the "
        "prompt's end, or to its beginning, but not to position " +
        std::to_string(length));
}

void Reuse::truncate(size_t length) {
  if (records_.size() > length) records_.resize(length);
  if (made_.end != kNone && length < made_.end) made_ = {0, kNone};
  if (length <= first_frozen_) first_frozen_ = kNone;
  if (length < num_summed_) {  // then it is 0
    num_summed_ = 0;
    sums_ = std::make_shared<std::vector<float>>(shape_.layers * shape_.neurons);
  }
}

void Reuse::reserve(size_t first, size_t count) {
  records_.resize(first + count);
  for (size_t i = first; i < first + count; ++i) {
    if (!keeps(i)) continue;
    records_[i] = std::make_shared<Record>();
    records_[i]->active.resize(set_.size());
  }
  if (has_sums(first) && sums_.use_count() > 1) sums_ = std::make_shared<std::vector<float>>(*sums_);
}

void Reuse::begin(size_t first, size_t count) {
  for (size_t i = first; i < first + count; ++i) {
    if (is(Policy::adaptive) && i > start_) records_[i]->is_open = decides_to_open(i);
    if (is_open(i)) continue;
    first_frozen_ = std::min(first_frozen_, i);
    make_set(i);
    if (is(Policy::adaptive)) add_sample(i);
  }
}

void Reuse::end(size_t first, size_t count) {
  if (is(Policy::prompt)) num_summed_ = std::max(num_summed_, std::min(first + count, prompt_length_));
  for (size_t i = first; is(Policy::adaptive) && i < first + count; ++i)
    if (!is_open(i)) count_missed(i);
}

const uint64_t* Reuse::candidates(size_t layer, size_t position) const {
  if (is_open(position)) return nullptr;
  return (is(Policy::adaptive) ? limited_ : set_).data() + layer * words_;
}

uint64_t* Reuse::active(size_t layer, size_t position) {
  return keeps(position) ? records_[position]->active.data() + layer * words_ : nullptr;
}

// ---- the set

// The positions whose active neurons make the set of a frozen one.
Reuse::Range Reuse::sources(size_t position) const {
  if (is(Policy::prompt)) return {0, prompt_length_};
  if (is(Policy::blocks)) {
    size_t end = position - (position - start_) % settings_.period;
    return {settings_.resets ? end - settings_.period : 0, end};
  }
  size_t end = last_open(position) + 1;
  return {end > settings_.window ? end - settings_.window : 0, end};
}

void Reuse::make_set(size_t position) {
  Range range = sources(position);
  if (made_.end == range.end && made_.first == range.first) return;
  bool grows = is(Policy::blocks) && !settings_.resets && !settings_.is_control && made_.end < range.end;
  if (!grows) std::fill(set_.begin(), set_.end(), 0);
  if (is(Policy::prompt))
    select_most();
  else
    collect({grows ? made_.end : range.first, range.end});
  made_ = range;
  if (settings_.is_control) draw_control();
}

void Reuse::collect(Range range) {
  for (size_t i = range.first; i < range.end; ++i)
    if (keeps(i))
      for (size_t word = 0; word < set_.size(); ++word) set_[word] |= records_[i]->active[word];
}

// In each layer the share of the neurons with the greatest sums, the lower of equals.
void Reuse::select_most() {
  auto count = static_cast<size_t>(settings_.share * static_cast<double>(shape_.neurons) + 0.5);
  std::vector<uint32_t> order(shape_.neurons);
  for (size_t layer = 0; layer < shape_.layers; ++layer) {
    const float* sums = sums_->data() + layer * shape_.neurons;
    std::iota(order.begin(), order.end(), 0u);
    auto is_greater = [sums](uint32_t a, uint32_t b) {
      return sums[a] != sums[b] ? sums[a] > sums[b] : a < b;
    };
    std::partial_sort(order.begin(), order.begin() + static_cast<ptrdiff_t>(count), order.end(), is_greater);
    for (size_t j = 0; j < count; ++j) set_[layer * words_ + order[j] / 64] |= uint64_t{1} << (order[j] % 64);
  }
}

// As many neurons of each layer as there are in the set, drawn at random.
void Reuse::draw_control() {
  std::vector<std::pair<uint64_t, uint32_t>> order(shape_.neurons);
  for (size_t layer = 0; layer < shape_.layers; ++layer) {
    uint64_t* set = set_.data() + layer * words_;
    uint64_t key = mix(static_cast<uint64_t>(made_.end) << 32 | layer);
    for (size_t i = 0; i < shape_.neurons; ++i) order[i] = {mix(key + i), static_cast<uint32_t>(i)};
    auto count = std::accumulate(set, set + words_, ptrdiff_t{0},
                                 [](ptrdiff_t sum, uint64_t word) { return sum + std::popcount(word); });
    std::partial_sort(order.begin(), order.begin() + count, order.end());
    std::fill_n(set, words_, 0);
    for (ptrdiff_t j = 0; j < count; ++j) {
      uint32_t i = order[static_cast<size_t>(j)].second;
      set[i / 64] |= uint64_t{1} << (i % 64);
    }
  }
}

// ---- adaptive: a sample of all neurons tells what the set misses

// One neuron of each 64, another one at each of 64 positions.
uint64_t Reuse::sample(size_t layer, size_t word, size_t position) const {
  size_t bit = (mix(static_cast<uint64_t>(layer) << 32 | word) + position) % 64;
  return word * 64 + bit < shape_.neurons ? uint64_t{1} << bit : 0;
}

void Reuse::add_sample(size_t position) {
  for (size_t i = 0; i < set_.size(); ++i) limited_[i] = set_[i] | sample(i / words_, i % words_, position);
}

void Reuse::count_missed(size_t position) {
  Record& record = *records_[position];
  for (size_t i = 0; i < set_.size(); ++i) {
    uint64_t active = record.active[i] & sample(i / words_, i % words_, position);
    record.sampled += static_cast<uint32_t>(std::popcount(active));
    record.missed += static_cast<uint32_t>(std::popcount(active & ~set_[i]));
  }
}

// ---- prompt: the neurons' share in each token's output (GRIFFIN, 2404.01365)

bool Reuse::has_sums(size_t position) const { return is(Policy::prompt) && position < prompt_length_; }

// The sum over tokens of (neuron / norm of all of them)^2, whose order is that of GRIFFIN's norm.
void Reuse::add(size_t layer, size_t, const float* neurons) {
  double square = 0.0;
  for (size_t i = 0; i < shape_.neurons; ++i) square += static_cast<double>(neurons[i]) * neurons[i];
  if (square == 0.0) return;
  float* sums = sums_->data() + layer * shape_.neurons;
  for (size_t i = 0; i < shape_.neurons; ++i)
    sums[i] += static_cast<float>(static_cast<double>(neurons[i]) * neurons[i] / square);
}

}  // namespace relufy
