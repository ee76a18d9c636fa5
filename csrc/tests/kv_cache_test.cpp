// Blocks are counted, shared, copied before a write, and given back.
#include "kv_cache.h"

#include "check.h"

using namespace relufy;

namespace {

constexpr size_t kLayers = 2, kHeads = 3, kHeadDim = 4;

void extend(KvCache& cache, SequenceId id, size_t count) {
  cache.reserve(id, count);
  cache.advance(id, count);
}

// Somewhere in the middle of a block's data.
uint8_t* part(KvCache& cache, SequenceId id, size_t block) {
  return cache.part(cache.blocks(id)[block], 1, 2);
}

void test_blocks_are_counted() {
  KvCache cache(kLayers, kHeads, kHeadDim, 100, Dtype::f32);  // rounded up to 4 blocks
  SequenceId a = cache.create();
  CHECK(cache.num_free_blocks() == 4);
  extend(cache, a, 33);
  CHECK(cache.num_free_blocks() == 2 && cache.length(a) == 33);
  cache.truncate(a, 32);
  CHECK(cache.num_free_blocks() == 3);
  CHECK(throws<std::invalid_argument>([&] { cache.truncate(a, 33); }));
  cache.release(a);
  CHECK(cache.num_free_blocks() == 4);
  CHECK(throws<std::invalid_argument>([&] { (void)cache.length(a); }));
}

void test_fork_copies_before_a_write() {
  KvCache cache(kLayers, kHeads, kHeadDim, 128, Dtype::f32);
  SequenceId a = cache.create();
  extend(cache, a, 40);
  part(cache, a, 0)[5] = 1.0f;
  part(cache, a, 1)[5] = 2.0f;
  SequenceId b = cache.fork(a);
  CHECK(cache.num_free_blocks() == 2);
  extend(cache, b, 1);
  CHECK(cache.num_free_blocks() == 1);            // the second block became b's own
  CHECK(part(cache, a, 0) == part(cache, b, 0));  // the first is still shared
  CHECK(part(cache, a, 1) != part(cache, b, 1));
  CHECK(part(cache, b, 1)[5] == 2.0f);
  part(cache, b, 1)[5] = 3.0f;
  CHECK(part(cache, a, 1)[5] == 2.0f);
  cache.release(a);
  CHECK(part(cache, b, 0)[5] == 1.0f && cache.num_free_blocks() == 2);
}

void test_truncated_into_a_shared_block() {
  KvCache cache(kLayers, kHeads, kHeadDim, 96, Dtype::f32);
  SequenceId a = cache.create();
  extend(cache, a, 32);
  SequenceId b = cache.fork(a);
  cache.truncate(b, 10);
  part(cache, a, 0)[0] = 4.0f;
  extend(cache, b, 1);
  CHECK(part(cache, a, 0) != part(cache, b, 0));
}

void test_out_of_room_changes_nothing() {
  KvCache cache(kLayers, kHeads, kHeadDim, 64, Dtype::f32);
  SequenceId a = cache.create(), b = cache.create();
  extend(cache, a, 40);
  CHECK(throws<OutOfKv>([&] { cache.reserve(b, 1); }));
  CHECK(cache.length(a) == 40 && cache.length(b) == 0);
  cache.truncate(a, 0);
  extend(cache, b, 64);
  CHECK(cache.num_free_blocks() == 0);
}

}  // namespace

int main() {
  test_blocks_are_counted();
  test_fork_copies_before_a_write();
  test_truncated_into_a_shared_block();
  test_out_of_room_changes_nothing();
}
