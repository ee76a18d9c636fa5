#include "thread_pool.h"

namespace relufy {
namespace {

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins, and gives the core away where the one waited for may need it.
template <class Condition>
void spin_until(Condition&& is_met) {
  for (size_t spins = 0; !is_met(); ++spins) {
    pause();
    if (spins > 2000) std::this_thread::yield();
  }
}

}  // namespace

ThreadPool::ThreadPool(size_t threads) {
  try {
    for (size_t i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stopping_ = true;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run_erased(Erased function, void* context) {
  std::lock_guard lock(running_);
  function_ = function;
  context_ = context;
  first_phase_ = static_cast<uint32_t>(ticket_.load(std::memory_order_relaxed) >> 32);
  inside_.fetch_and(~kClosed, std::memory_order_release);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  Team team(*this, 0, first_phase_);
  function(context, team);
  inside_.fetch_or(kClosed, std::memory_order_acq_rel);
  spin_until([this] { return inside_.load(std::memory_order_acquire) == kClosed; });
}

void ThreadPool::work(size_t thread) {
  for (uint32_t epoch = 0;;) {
    epoch = epoch_after(epoch);
    if (stopping_) return;  // asked after that: a stop that this misses changes the epoch once more
    bool may_enter = !(inside_.fetch_add(1, std::memory_order_acq_rel) & kClosed);
    if (may_enter) {
      Team team(*this, thread, first_phase_);
      function_(context_, team);
    }
    inside_.fetch_sub(1, std::memory_order_release);
  }
}

// Waits for the epoch to be another than `seen`, and returns it.
uint32_t ThreadPool::epoch_after(uint32_t seen) {
  auto has_changed = [&] { return epoch_.load(std::memory_order_acquire) != seen; };
  auto give_up = std::chrono::steady_clock::now() + kSpinTime;
  while (!has_changed() && std::chrono::steady_clock::now() < give_up)
    for (int i = 0; i < 32 && !has_changed(); ++i) pause();
  while (!has_changed()) epoch_.wait(seen, std::memory_order_acquire);
  return epoch_.load(std::memory_order_acquire);
}

// Reports this thread's finished tasks; whoever reports the last ones opens the next phase.
void Team::end(uint32_t phase, uint32_t mine, uint32_t tasks) {
  if (mine > 0 && pool_.done_.fetch_add(mine, std::memory_order_acq_rel) + mine == tasks) {
    pool_.done_.store(0, std::memory_order_relaxed);
    pool_.ticket_.store(uint64_t{phase + 1} << 32, std::memory_order_release);
    return;
  }
  spin_until([&] { return pool_.ticket_.load(std::memory_order_acquire) >> 32 != phase; });
}

}  // namespace relufy
