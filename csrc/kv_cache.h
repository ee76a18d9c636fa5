// Keys and values of all sequences, in blocks of kKvBlock positions with reference counts.
//
// A block holds its positions for every layer and head. Sequences with a common past share its blocks; the
// one that writes to a shared block gets a copy of its own first.
//
// A full block is known by all that its contents depend on: its tokens, the block before it (by a name that
// is never given again), and how many of its positions are the prompt's, where the model's masks ask for
// that. The name stands for the same of the block before, and so on: a chain, compared in full and not by
// hashes alone. A known block that no sequence holds is idle: it counts as free, and a sequence that begins
// alike takes it up again, until its room is needed. The least recently used goes first; a sequence lets go
// of its last block first, so that a block outlives those that follow it.
#pragma once

#include <array>
#include <cstdint>
#include <list>
#include <map>
#include <span>
#include <stdexcept>
#include <unordered_map>
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

struct KvShape {
  size_t num_layers, num_kv_heads, head_dim;
};

class KvCache {
 public:
  // New memory is asked for, rather than an idle block's taken, only while the idle ones hold less than this.
  static constexpr size_t kIdleBytes = size_t{1} << 30;

  // Room for `positions` in all, rounded up to whole blocks; `dtype` is f32, bf16 or f16. With `has_phases`,
  // a position's contents depend on whether it belongs to the prompt.
  KvCache(KvShape shape, size_t positions, Dtype dtype, bool has_phases = false,
          size_t idle_bytes = kIdleBytes);

  Dtype dtype() const { return dtype_; }
  size_t element_bytes() const { return dtype_ == Dtype::f32 ? 4 : 2; }

  // Positions below `prompt_length` are the prompt's: some masks leave them dense.
  SequenceId create(size_t prompt_length = 0);
  SequenceId fork(SequenceId parent);
  void release(SequenceId id);

  // Forgets all positions from `length` on.
  void truncate(SequenceId id, size_t length);

  // Gives an empty sequence the known blocks that hold the first of these tokens, never all of them; returns
  // how many positions that are.
  size_t reuse(SequenceId id, std::span<const int32_t> tokens);

  size_t length(SequenceId id) const { return find(id).tokens.size(); }
  size_t prompt_length(SequenceId id) const { return find(id).prompt_length; }

  // Valid until the sequence changes.
  std::span<const int32_t> tokens(SequenceId id) const { return find(id).tokens; }

  size_t num_free_blocks() const { return capacity_ - num_used_; }  // the idle ones among them
  size_t num_idle_blocks() const { return idle_.size(); }
  size_t bytes() const { return blocks_.size() * block_bytes_; }  // of memory held

  // Throws OutOfKv if there is no room for `count` more positions.
  void check_room(SequenceId id, size_t count) const;

  // Makes sure that `count` more positions can be written. Throws OutOfKv before anything has changed.
  void reserve(SequenceId id, size_t count);

  // Lets reserved positions, one for each token, count as written. Full blocks can be found by others as far
  // as they lie within the first `num_known` positions.
  void advance(SequenceId id, std::span<const int32_t> tokens, size_t num_known = SIZE_MAX);

  // The blocks that hold a sequence's positions, in order. Valid until the sequence changes.
  const size_t* blocks(SequenceId id) const { return find(id).blocks.data(); }

  // A block's part for a layer and head: K (head_dim x kKvBlock), then V (kKvBlock x kv_width(head_dim)).
  uint8_t* part(size_t block, size_t layer, size_t kv_head) {
    return blocks_[block].data.get() + (layer * num_kv_heads_ + kv_head) * part_bytes_;
  }

 private:
  // What a full block's contents depend on.
  struct Content {
    uint64_t before;         // the name of the block before it, or 0
    uint64_t prompt_length;  // within the block; 0 where that makes no difference
    std::array<int32_t, kKvBlock> tokens;

    bool operator==(const Content&) const = default;
  };
  struct ContentHash {
    size_t operator()(const Content& content) const;
  };

  struct Block {
    Buffer<uint8_t> data;
    size_t references = 0;
    uint64_t name = 0;                 // 0: not known
    const Content* content = nullptr;  // of a known block, in index_
    std::list<size_t>::iterator idle;  // of a known block without references, in idle_
  };
  struct Sequence {
    std::vector<size_t> blocks;
    std::vector<int32_t> tokens;
    size_t prompt_length = 0;
  };

  const Sequence& find(SequenceId id) const;
  Sequence& find(SequenceId id) { return const_cast<Sequence&>(std::as_const(*this).find(id)); }
  Content content_of(const Sequence& sequence, size_t index, const int32_t* tokens) const;
  void make_known(Sequence& sequence, size_t index);
  void make_writable(size_t& block);
  void forget(size_t block);
  size_t take_block();
  size_t unused_block();
  void hold_block(size_t block);
  void drop_block(size_t block);

  Dtype dtype_;
  bool has_phases_;
  size_t num_kv_heads_, part_bytes_, block_bytes_, capacity_, idle_bytes_;
  size_t num_used_ = 0;
  SequenceId next_id_ = 1;
  uint64_t next_name_ = 1;
  std::vector<Block> blocks_;
  std::vector<size_t> free_;  // made, and neither held nor known
  std::list<size_t> idle_;    // the least recently used first
  std::unordered_map<Content, size_t, ContentHash> index_;
  std::map<SequenceId, Sequence> sequences_;
};

}  // namespace relufy
