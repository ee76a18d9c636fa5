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

SequenceId Engine::new_sequence(size_t prompt_length, std::unique_ptr<ActiveSetPolicy> policy) {
  std::lock_guard lock(mutex_);
  check_policy(policy.get());
  SequenceId id = kv_.create(prompt_length);
  if (policy) policies_[id] = std::move(policy);
  return id;
}

SequenceId Engine::fork(SequenceId parent) {
  std::lock_guard lock(mutex_);
  const ActiveSetPolicy* own = find_policy(parent);
  std::unique_ptr<ActiveSetPolicy> policy = own ? own->fork() : nullptr;
  SequenceId id = kv_.fork(parent);
  if (policy) policies_[id] = std::move(policy);
  return id;
}

SequenceId Engine::fork(SequenceId parent, const PolicyMaker& make) {
  std::lock_guard lock(mutex_);
  std::unique_ptr<ActiveSetPolicy> policy = make(find_policy(parent), kv_.length(parent));
  check_policy(policy.get());
  SequenceId id = kv_.fork(parent);
  if (policy) policies_[id] = std::move(policy);
  return id;
}

void Engine::truncate(SequenceId id, size_t length) {
  std::lock_guard lock(mutex_);
  ActiveSetPolicy* policy = find_policy(id);
  if (policy && length < kv_.length(id)) policy->check_truncate(length);
  truncate_locked(id, length);
}

void Engine::truncate_locked(SequenceId id, size_t length) {
  kv_.truncate(id, length);
  if (ActiveSetPolicy* policy = find_policy(id)) policy->truncate(length);
}

void Engine::free(SequenceId id) {
  std::lock_guard lock(mutex_);
  kv_.release(id);
  policies_.erase(id);
}

const ActiveSetPolicy* Engine::policy(SequenceId id) {
  std::lock_guard lock(mutex_);
  return find_policy(id);
}

ActiveSetPolicy* Engine::find_policy(SequenceId id) const {
  auto found = policies_.find(id);
  return found == policies_.end() ? nullptr : found->second.get();
}

void Engine::check_policy(const ActiveSetPolicy* policy) const {
  std::string reason = !policy ? "" : policy->has_predictor() ? refuses_prediction() : refuses_candidates();
  if (!reason.empty()) throw std::invalid_argument("this file's neurons can't be limited: " + reason);
}

std::string Engine::refuses_candidates() const {
  for (size_t i = 0; i < decoder_.num_layers; ++i) {
    const char* reason = decoder_.layers[i].refuses_candidates();
    if (reason) return std::string(reason) + " (layer " + std::to_string(i) + ")";
  }
  return "";
}

std::string Engine::refuses_prediction() const {
  if (decoder_.predictor_rank == 0)
    return "it has no predictor; make one with relufy predictor, and pack the model for predictor";
  for (size_t i = 0; i < decoder_.num_layers; ++i) {
    const Layer& layer = decoder_.layers[i];
    const char* reason = layer.predictor ? layer.refuses_candidates() : nullptr;
    if (reason) return std::string(reason) + " (layer " + std::to_string(i) + ")";
  }
  return "";
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
  const ActiveSetPolicy* policy = find_policy(id);
  if (policy && policy->num_unseen() < tokens.size()) tokens = tokens.first(policy->num_unseen() + 1);
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
    total.limited += scratch.limited;
    for (size_t i = 0; i < decoder_.num_layers; ++i) {
      total.candidates[i] += scratch.candidates[i];
      total.fired[i] += scratch.fired[i];
    }
    for (size_t site = 0; site < kNumSites; ++site)
      for (size_t i = 0; i < decoder_.num_layers; ++i) total.used[site][i] += scratch.used[site][i];
  }
  return total;
}

void Engine::reset_stats() {
  std::lock_guard lock(mutex_);
  stats_ = Stats{};
  for (auto& by_layer : stats_.used) by_layer.resize(decoder_.num_layers);
  stats_.candidates.resize(decoder_.num_layers);
  stats_.fired.resize(decoder_.num_layers);
  for (Scratch& scratch : scratch_) {
    scratch.weight_bytes = scratch.kv_bytes = scratch.limited = 0;
    for (auto& by_layer : scratch.used) std::fill(by_layer.begin(), by_layer.end(), Use{});
    std::fill(scratch.candidates.begin(), scratch.candidates.end(), Use{});
    std::fill(scratch.fired.begin(), scratch.fired.end(), 0);
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
      if (ActiveSetPolicy* policy = find_policy(item.sequence))
        policy->reserve(kv_.length(item.sequence), item.tokens.size());
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
void Engine::give_back(SequenceId id) { truncate_locked(id, kv_.length(id)); }

// Calls call(policy, first position, count) for each policy among the tokens.
template <class Call>
void Engine::for_policies(std::span<const Token> tokens, Call&& call) const {
  for (size_t t = 0, end; t < tokens.size(); t = end) {
    for (end = t + 1; end < tokens.size() && tokens[end].blocks == tokens[t].blocks;) ++end;
    if (tokens[t].policy) call(*tokens[t].policy, tokens[t].place.position, end - t);
  }
}

// The tokens from `start` on that go through the layers together: until there are enough, or one needs to
// know of another's active neurons.
std::span<const Engine::Token> Engine::passage(size_t start) const {
  auto tokens = std::span(tokens_).subspan(start, std::min(kMostTokens, tokens_.size() - start));
  size_t length = tokens.size(), seen = 0;
  for_policies(tokens, [&](const ActiveSetPolicy& policy, size_t first, size_t count) {
    while (tokens[seen].policy != &policy) ++seen;
    size_t some = policy.together(first, count);
    if (some < count) length = std::min(length, seen + some);
    seen += count;
  });
  return tokens.first(length);
}

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
    ActiveSetPolicy* policy = find_policy(item.sequence);
    for (size_t i = 0; i < item.tokens.size(); ++i) {
      bool is_last = i + 1 == item.tokens.size();
      bool wants = wanted == Logits::all || (wanted == Logits::last && is_last);
      tokens_.push_back(
          {item.tokens[i], {start + i, prompt_length}, kv_.blocks(item.sequence), wants, policy});
    }
  }
  for (size_t start = 0; start < tokens_.size();) {
    std::span<const Token> chunk = passage(start);
    for_policies(chunk, [](ActiveSetPolicy& policy, size_t first, size_t n) { policy.begin(first, n); });
    pool_.run([&](Team& team) { forward(chunk, logits, team); });
    for_policies(chunk, [](ActiveSetPolicy& policy, size_t first, size_t n) { policy.end(first, n); });
    if (logits)
      for (const Token& token : chunk) logits += token.wants_logits * decoder_.vocab_size;
    start += chunk.size();
  }
  for (const Work& item : work) {
    const ActiveSetPolicy* policy = find_policy(item.sequence);
    kv_.advance(item.sequence, item.tokens, policy ? policy->num_exact() : SIZE_MAX);
  }
  stats_.tokens += tokens_.size();
}

}  // namespace relufy
