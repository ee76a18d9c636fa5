#include "kv_cache.h"

#include <string>
#include <utility>

namespace relufy {
namespace {

size_t blocks_for(size_t positions) { return (positions + kKvBlock - 1) / kKvBlock; }

}  // namespace

KvCache::KvCache(size_t num_layers, size_t num_kv_heads, size_t head_dim, size_t positions, Dtype dtype)
    : dtype_(dtype),
      num_kv_heads_(num_kv_heads),
      part_bytes_(kKvBlock * (head_dim + kv_width(head_dim)) * element_bytes()),
      block_bytes_(num_layers * num_kv_heads * part_bytes_),
      capacity_(blocks_for(positions)) {}

const KvCache::Sequence& KvCache::find(SequenceId id) const {
  auto found = sequences_.find(id);
  if (found == sequences_.end()) throw std::invalid_argument("there is no sequence " + std::to_string(id));
  return found->second;
}

SequenceId KvCache::create(size_t prompt_length) {
  sequences_[next_id_].prompt_length = prompt_length;
  return next_id_++;
}

SequenceId KvCache::fork(SequenceId parent) {
  Sequence copy = find(parent);
  for (size_t block : copy.blocks) ++blocks_[block].references;
  sequences_[next_id_] = std::move(copy);
  return next_id_++;
}

void KvCache::release(SequenceId id) {
  truncate(id, 0);
  sequences_.erase(id);
}

void KvCache::truncate(SequenceId id, size_t length) {
  Sequence& sequence = find(id);
  if (length > sequence.length)
    throw std::invalid_argument("can't truncate a sequence of " + std::to_string(sequence.length) +
                                " positions to " + std::to_string(length));
  sequence.length = length;
  while (sequence.blocks.size() > blocks_for(length)) {
    drop_block(sequence.blocks.back());
    sequence.blocks.pop_back();
  }
}

void KvCache::reserve(SequenceId id, size_t count) {
  Sequence& sequence = find(id);
  if (count == 0) return;
  size_t written = sequence.length / kKvBlock;  // the first block that will be written to
  if (written < sequence.blocks.size() && blocks_[sequence.blocks[written]].references > 1) {
    size_t own = take_block();
    size_t shared = std::exchange(sequence.blocks[written], own);
    std::memcpy(blocks_[own].data.get(), blocks_[shared].data.get(), block_bytes_);
    drop_block(shared);
  }
  while (sequence.blocks.size() < blocks_for(sequence.length + count))
    sequence.blocks.push_back(take_block());
}

size_t KvCache::take_block() {
  if (num_used_ == capacity_)
    throw OutOfKv("no room for more tokens: all " + std::to_string(capacity_ * kKvBlock) +
                  " positions of the context are taken");
  size_t block;
  if (free_.empty()) {
    block = blocks_.size();
    blocks_.push_back({make_buffer<uint8_t>(block_bytes_), 0});
  } else {
    block = free_.back();
    free_.pop_back();
  }
  blocks_[block].references = 1;
  ++num_used_;
  return block;
}

void KvCache::drop_block(size_t block) {
  if (--blocks_[block].references > 0) return;
  free_.push_back(block);
  --num_used_;
}

}  // namespace relufy
