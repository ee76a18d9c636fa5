// Threads that walk through one step together.
//
// All threads run the same body, a sequence of phases; a phase is a number of tasks, claimed one by one. A
// phase ends when its tasks are done, not when all threads have arrived: a thread that lost its core to
// another program holds nobody up unless it is in the middle of a task, and catches up by passing over the
// phases that it missed. Waiting spins: waking a sleeping thread costs 100 us, a whole token of a small
// model. Between steps the threads spin for kSpinTime, then park.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace relufy {

class Team;

class ThreadPool {
 public:
  explicit ThreadPool(size_t threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  size_t size() const { return workers_.size() + 1; }

  // Runs body(team) on the caller's thread and on those of the others that are free, and returns when all its
  // phases are done; callers queue. Only the tasks may have effects: a thread may run the body late, or
  // again. It must not throw.
  template <class Body>
  void run(Body&& body) {
    run_erased([](void* context, Team& team) { (*static_cast<Body*>(context))(team); }, &body);
  }

 private:
  friend class Team;
  using Erased = void (*)(void*, Team&);
  static constexpr std::chrono::microseconds kSpinTime{200};
  static constexpr uint32_t kClosed = uint32_t{1} << 31;

  void stop();
  void run_erased(Erased function, void* context);
  void work(size_t thread);
  uint32_t epoch_after(uint32_t seen);

  std::mutex running_;
  std::vector<std::thread> workers_;
  Erased function_ = nullptr;
  void* context_ = nullptr;
  uint32_t first_phase_ = 0;
  std::atomic<bool> stopping_{false};                  // then the epoch has changed, or is about to
  alignas(64) std::atomic<uint32_t> epoch_{0};         // counts calls of run; workers wait for it to change
  alignas(64) std::atomic<uint32_t> inside_{kClosed};  // workers in the body, and whether no more may enter
  alignas(64) std::atomic<uint64_t> ticket_{0};        // phase << 32 | its next task
  alignas(64) std::atomic<uint32_t> done_{0};          // finished tasks of the phase
};

// One thread's way through the phases of a body.
class Team {
 public:
  Team(ThreadPool& pool, size_t thread, uint32_t first_phase)
      : pool_(pool), thread_(thread), phase_(first_phase) {}

  // In [0, pool.size()); no two threads that are in the body have the same.
  size_t thread() const { return thread_; }

  // Called by every thread alike, with the same number of tasks (at least one): runs task(i), shared out, for
  // i in [0, tasks), and returns when all are done. What the tasks wrote can then be read.
  template <class Task>
  void for_each(size_t tasks, Task&& task) {
    for_each(tasks, task, [] {});
  }

  // The same, where a thread may put off the end of a task until it has claimed the next one: `finish`,
  // called by each thread that had a task and finds no more, ends the last.
  template <class Task, class Finish>
  void for_each(size_t tasks, Task&& task, Finish&& finish) {
    uint32_t phase = phase_++, mine = 0;
    for (uint64_t ticket = pool_.ticket_.load(std::memory_order_acquire);;) {
      if (ticket >> 32 != phase) return;  // over: then none of its tasks was mine
      uint32_t index = static_cast<uint32_t>(ticket);
      if (index >= tasks) break;
      if (!pool_.ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acquire)) continue;
      task(size_t{index});
      ++mine;
      ticket = pool_.ticket_.load(std::memory_order_acquire);
    }
    if (mine > 0) finish();
    end(phase, mine, static_cast<uint32_t>(tasks));
  }

 private:
  void end(uint32_t phase, uint32_t mine, uint32_t tasks);

  ThreadPool& pool_;
  size_t thread_;
  uint32_t phase_;
};

}  // namespace relufy
