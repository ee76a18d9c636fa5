// Every task runs once, phases do not overlap, a parked pool wakes up and ends, and nobody waits for a thread
// that is away.
#include "thread_pool.h"

#include "check.h"

using namespace relufy;

namespace {

void test_every_task_runs_once(size_t threads) {
  ThreadPool pool(threads);
  CHECK(pool.size() == threads);
  std::vector<std::atomic<int>> counts(1000);
  pool.run([&](Team& team) {
    CHECK(team.thread() < threads);
    team.for_each(counts.size(), [&](size_t i) { ++counts[i]; });
  });
  for (int count : counts) CHECK(count == 1);
}

// Phase p reads what phase p - 1 wrote; an overlap would read a stale value.
void test_phases_are_ordered(size_t threads) {
  ThreadPool pool(threads);
  std::vector<size_t> values(7), before(7);
  for (size_t round = 0; round < 200; ++round)
    pool.run([&](Team& team) {
      for (size_t phase = 0; phase < 20; ++phase) {
        team.for_each(values.size(), [&](size_t i) { before[i] = values[(i + 1) % values.size()]; });
        team.for_each(values.size(), [&](size_t i) { values[i] = before[i] + 1; });
      }
    });
  for (size_t value : values) CHECK(value == 200 * 20);
}

void test_wakes_after_parking(size_t threads) {
  ThreadPool pool(threads);
  std::atomic<size_t> sum{0};
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    pool.run([&](Team& team) { team.for_each(10, [&](size_t i) { sum += i; }); });
  }
  CHECK(sum == 5 * 45);
}

// A thread that sleeps outside of a task misses all phases; the others get through them without it.
void test_nobody_waits_for_a_thread_that_is_away() {
  ThreadPool pool(2);
  std::atomic<bool> is_over{false};
  std::atomic<size_t> sum{0};
  for (int round = 0; round < 20; ++round) {
    is_over = false;
    pool.run([&](Team& team) {
      if (team.thread() == 1)
        while (!is_over) std::this_thread::yield();
      for (size_t phase = 0; phase < 50; ++phase) team.for_each(3, [&](size_t i) { sum += i; });
      is_over = true;
    });
  }
  CHECK(sum == 20 * 50 * 3);
}

// A worker that wakes up for work that is over must still see that the pool is going.
void test_ends_in_the_middle_of_waking() {
  std::atomic<size_t> sum{0};
  for (int round = 0; round < 3000; ++round) {
    ThreadPool pool(3);
    pool.run([&](Team& team) { team.for_each(3, [&](size_t i) { sum += i; }); });
  }
  CHECK(sum == 3000 * 3);
}

}  // namespace

int main() {
  for (size_t threads : {1, 2, 3, 7}) {
    test_every_task_runs_once(threads);
    test_phases_are_ordered(threads);
    test_wakes_after_parking(threads);
  }
  test_nobody_waits_for_a_thread_that_is_away();
  test_ends_in_the_middle_of_waking();
}
