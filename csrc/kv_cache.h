// Keys and values of all sequences, in blocks of kKvBlock positions with reference counts.
//
// A block holds its positions for every layer and head; it is made when first needed and reused when freed.
// Sequences that forked share blocks; the one that writes to a shared block gets a copy of its own first.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <utility>
#include <vector>

#include "buffer.h"
#include "kernels.h"

namespace relufy {

using SequenceId = uint64_t;

// There is no block left; the caller can free or truncate a sequence and try again.
struct OutOfKv : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class KvCache {
 public:
  // Room for `positions` in all, rounded up to whole blocks; `dtype` is f32, bf16 or f16.
  KvCache(size_t num_layers, size_t num_kv_heads, size_t head_dim, size_t positions, Dtype dtype);

  Dtype dtype() const { return dtype_; }
  size_t element_bytes() const { return dtype_ == Dtype::f32 ? 4 : 2; }

  // Positions below `prompt_length` are the prompt's: some masks leave them dense.
  SequenceId create(size_t prompt_length = 0);
  SequenceId fork(SequenceId parent);
  void release(SequenceId id);

  // Forgets all positions from `length` on.
  void truncate(SequenceId id, size_t length);

  size_t length(SequenceId id) const { return find(id).length; }
  size_t prompt_length(SequenceId id) const { return find(id).prompt_length; }
  size_t num_free_blocks() const { return capacity_ - num_used_; }

  // Makes sure that `count` more positions can be written. Throws OutOfKv, changing no length.
  void reserve(SequenceId id, size_t count);

  // Lets `count` reserved positions count as written.
  void advance(SequenceId id, size_t count) { find(id).length += count; }

  // The blocks that hold a sequence's positions, in order. Valid until the sequence changes.
  const size_t* blocks(SequenceId id) const { return find(id).blocks.data(); }

  // A block's part for a layer and head: K (head_dim x kKvBlock), then V (kKvBlock x kv_width(head_dim)).
  uint8_t* part(size_t block, size_t layer, size_t kv_head) {
    return blocks_[block].data.get() + (layer * num_kv_heads_ + kv_head) * part_bytes_;
  }

 private:
  struct Block {
    Buffer<uint8_t> data;
    size_t references = 0;
  };
  struct Sequence {
    std::vector<size_t> blocks;
    size_t length = 0, prompt_length = 0;
  };

  const Sequence& find(SequenceId id) const;
  Sequence& find(SequenceId id) { return const_cast<Sequence&>(std::as_const(*this).find(id)); }
  size_t take_block();
  void drop_block(size_t block);

  Dtype dtype_;
  size_t num_kv_heads_, part_bytes_, block_bytes_, capacity_;
  size_t num_used_ = 0;
  SequenceId next_id_ = 1;
  std::vector<Block> blocks_;
  std::vector<size_t> free_;
  std::map<SequenceId, Sequence> sequences_;
};

}  // namespace relufy
