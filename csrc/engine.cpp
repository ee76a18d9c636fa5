#include "engine.h"

#include <algorithm>
#include <utility>

namespace relufy {
namespace {

// Whether a token's keys and values depend on its being the prompt's.
bool has_phases(const Decoder& decoder) {
  for (const Layer& l : decoder.layers)
    for (const Selection* s :
         {&l.q.mask, &l.k.mask, &l.v.mask, &l.o.mask, &l.gate.mask, &l.up.mask, &l.down.mask, &l.neuron})
      if (*s && s->decode_only) return true;
  return false;
}

}  // namespace

Engine::Engine(const std::string& path, Options options, std::shared_ptr<ThreadPool> threads)
    : file_(path, options.memory, options.locks_memory),
      decoder_(file_),
      kernels_(kernels()),
      context_(options.context ? options.context : decoder_.max_context),
      skip_(options.skip),
      kv_({decoder_.num_layers, decoder_.num_kv_heads, decoder_.head_dim}, context_, options.kv_dtype,
          has_phases(decoder_)),
      shared_pool_(threads ? std::move(threads)
                           : std::make_shared<ThreadPool>(std::max<size_t>(1, options.threads))),
      pool_(*shared_pool_),
      sampler_(decoder_.vocab_size) {
  allocate();
}

SequenceId Engine::new_sequence(size_t prompt_length) {
  std::lock_guard lock(mutex_);
  return kv_.create(prompt_length);
}

SequenceId Engine::fork(SequenceId parent) {
  std::lock_guard lock(mutex_);
  return kv_.fork(parent);
}

void Engine::truncate(SequenceId id, size_t length) {
  std::lock_guard lock(mutex_);
  kv_.truncate(id, length);
}

void Engine::free(SequenceId id) {
  std::lock_guard lock(mutex_);
  kv_.release(id);
}

size_t Engine::length(SequenceId id) {
  std::lock_guard lock(mutex_);
  return kv_.length(id);
}

size_t Engine::prompt_length(SequenceId id) {
  std::lock_guard lock(mutex_);
  return kv_.prompt_length(id);
}

size_t Engine::free_positions() {
  std::lock_guard lock(mutex_);
  return kv_.num_free_blocks() * kKvBlock;
}

std::vector<int32_t> Engine::tokens(SequenceId id) {
  std::lock_guard lock(mutex_);
  std::span<const int32_t> tokens = kv_.tokens(id);
  return {tokens.begin(), tokens.end()};
}

size_t Engine::reuse_prefix(SequenceId id, std::span<const int32_t> tokens) {
  std::lock_guard lock(mutex_);
  check(tokens);
  size_t reused = kv_.reuse(id, tokens);
  stats_.reused += reused;
  return reused;
}

void Engine::set_crossover(Product product, Dtype dtype, size_t tokens, float share) {
  std::lock_guard lock(mutex_);
  crossover_.set(product, dtype, tokens, share);
}

Stats Engine::stats() {
  std::lock_guard lock(mutex_);
  Stats total = stats_;
  for (const Scratch& scratch : scratch_) {
    total.weight_bytes += scratch.weight_bytes;
    total.kv_bytes += scratch.kv_bytes;
    for (size_t site = 0; site < kNumSites; ++site)
      for (size_t i = 0; i < decoder_.num_layers; ++i) total.used[site][i] += scratch.used[site][i];
  }
  return total;
}

void Engine::reset_stats() {
  std::lock_guard lock(mutex_);
  stats_ = Stats{};
  for (auto& by_layer : stats_.used) by_layer.resize(decoder_.num_layers);
  for (Scratch& scratch : scratch_) {
    scratch.weight_bytes = scratch.kv_bytes = 0;
    for (auto& by_layer : scratch.used) std::fill(by_layer.begin(), by_layer.end(), Use{});
  }
}

size_t Engine::num_logits(std::span<const Work> work, Logits wanted) {
  if (wanted == Logits::none) return 0;
  if (wanted == Logits::last) return work.size();
  size_t count = 0;
  for (const Work& item : work) count += item.tokens.size();
  return count;
}

void Engine::check(std::span<const Work> work) const {
  for (size_t i = 0; i < work.size(); ++i) {
    if (work[i].tokens.empty())
      throw std::invalid_argument("a step needs at least one token for each sequence");
    for (size_t j = 0; j < i; ++j)
      if (work[j].sequence == work[i].sequence)
        throw std::invalid_argument("a step names a sequence twice; give its tokens together");
    check(work[i].tokens);
    check_room(work[i].sequence, work[i].tokens.size());
  }
}

void Engine::check(std::span<const int32_t> tokens) const {
  for (int32_t token : tokens)
    if (token < 0 || static_cast<size_t>(token) >= decoder_.vocab_size)
      throw std::invalid_argument("token " + std::to_string(token) + " is not in the vocabulary of " +
                                  std::to_string(decoder_.vocab_size));
}

void Engine::check_room(SequenceId id, size_t count) const {
  size_t length = kv_.length(id);
  if (count > decoder_.max_context - length)
    throw OutOfKv("the model's context has " + std::to_string(decoder_.max_context) +
                  " positions: no room for " + std::to_string(count) + " tokens after " +
                  std::to_string(length));
}

// Room for all; if there is none, the sequences are as before.
void Engine::reserve(std::span<const Work> work) {
  try {
    size_t tokens = 0;
    for (const Work& item : work) {
      kv_.reserve(item.sequence, item.tokens.size());
      make_scores(kv_.length(item.sequence) + item.tokens.size());
      tokens += item.tokens.size();
    }
    make_room(std::min(tokens, kMostTokens));
  } catch (...) {
    for (const Work& item : work) give_back(item.sequence);
    throw;
  }
}

// Blocks that were reserved and not written to.
void Engine::give_back(SequenceId id) { kv_.truncate(id, kv_.length(id)); }

void Engine::step(std::span<const Work> work, Logits wanted, float* logits) {
  std::lock_guard lock(mutex_);
  step_locked(work, wanted, logits);
}

void Engine::step_locked(std::span<const Work> work, Logits wanted, float* logits) {
  check(work);
  reserve(work);
  tokens_.clear();
  for (const Work& item : work) {
    size_t start = kv_.length(item.sequence), prompt_length = kv_.prompt_length(item.sequence);
    for (size_t i = 0; i < item.tokens.size(); ++i) {
      bool is_last = i + 1 == item.tokens.size();
      bool wants = wanted == Logits::all || (wanted == Logits::last && is_last);
      tokens_.push_back({item.tokens[i], {start + i, prompt_length}, kv_.blocks(item.sequence), wants});
    }
  }
  for (size_t start = 0; start < tokens_.size(); start += kMostTokens) {
    auto chunk =
        std::span<const Token>(tokens_).subspan(start, std::min(kMostTokens, tokens_.size() - start));
    pool_.run([&](Team& team) { forward(chunk, logits, team); });
    if (logits)
      for (const Token& token : chunk) logits += token.wants_logits * decoder_.vocab_size;
  }
  for (const Work& item : work) kv_.advance(item.sequence, item.tokens);
  stats_.tokens += tokens_.size();
}

}  // namespace relufy
