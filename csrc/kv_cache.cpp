#include "kv_cache.h"

#include <algorithm>
#include <string>
#include <utility>

#include "mix.h"

namespace relufy {
namespace {

size_t blocks_for(size_t positions) { return (positions + kKvBlock - 1) / kKvBlock; }

}  // namespace

KvCache::KvCache(KvShape shape, size_t positions, Dtype dtype, bool has_phases, size_t idle_bytes)
    : dtype_(dtype),
      has_phases_(has_phases),
      num_kv_heads_(shape.num_kv_heads),
      part_bytes_(kKvBlock * (shape.head_dim + kv_width(shape.head_dim)) * element_bytes()),
      block_bytes_(shape.num_layers * shape.num_kv_heads * part_bytes_),
      capacity_(blocks_for(positions)),
      idle_bytes_(idle_bytes) {}

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
  for (size_t block : copy.blocks) hold_block(block);
  sequences_[next_id_] = std::move(copy);
  return next_id_++;
}

void KvCache::release(SequenceId id) {
  truncate(id, 0);
  sequences_.erase(id);
}

void KvCache::truncate(SequenceId id, size_t length) {
  Sequence& sequence = find(id);
  if (length > sequence.tokens.size())
    throw std::invalid_argument("can't truncate a sequence of " + std::to_string(sequence.tokens.size()) +
                                " positions to " + std::to_string(length));
  sequence.tokens.resize(length);
  while (sequence.blocks.size() > blocks_for(length)) {
    drop_block(sequence.blocks.back());
    sequence.blocks.pop_back();
  }
}

size_t KvCache::reuse(SequenceId id, std::span<const int32_t> tokens) {
  Sequence& sequence = find(id);
  if (!sequence.tokens.empty())
    throw std::invalid_argument("only an empty sequence can begin with what is cached, and this one has " +
                                std::to_string(sequence.tokens.size()) + " positions");
  size_t reused = 0;
  for (; reused + kKvBlock < tokens.size(); reused += kKvBlock) {
    auto found = index_.find(content_of(sequence, reused / kKvBlock, &tokens[reused]));
    if (found == index_.end()) break;
    hold_block(found->second);
    sequence.blocks.push_back(found->second);
  }
  sequence.tokens.assign(tokens.begin(), tokens.begin() + static_cast<ptrdiff_t>(reused));
  return reused;
}

void KvCache::check_room(SequenceId id, size_t count) const {
  const Sequence& sequence = find(id);
  size_t held = sequence.blocks.size(), written = sequence.tokens.size() / kKvBlock;
  bool needs_copy = count > 0 && written < held && blocks_[sequence.blocks[written]].references > 1;
  size_t needed = std::max(blocks_for(sequence.tokens.size() + count), held) - held + needs_copy;
  if (needed > num_free_blocks())
    throw OutOfKv("no room for " + std::to_string(count) +
                  " more tokens: " + std::to_string(num_used_ * kKvBlock) + " of the context's " +
                  std::to_string(capacity_ * kKvBlock) + " positions are taken, in blocks of " +
                  std::to_string(kKvBlock));
}

void KvCache::reserve(SequenceId id, size_t count) {
  check_room(id, count);
  if (count == 0) return;
  Sequence& sequence = find(id);
  size_t before = sequence.tokens.size(), length = before + count, written = before / kKvBlock;
  if (length > sequence.tokens.capacity()) sequence.tokens.reserve(std::max(length, 2 * before));
  if (written < sequence.blocks.size()) make_writable(sequence.blocks[written]);
  while (sequence.blocks.size() < blocks_for(length)) sequence.blocks.push_back(take_block());
}

void KvCache::advance(SequenceId id, std::span<const int32_t> tokens, size_t num_known) {
  Sequence& sequence = find(id);
  size_t full = sequence.tokens.size() / kKvBlock;
  sequence.tokens.insert(sequence.tokens.end(), tokens.begin(), tokens.end());
  size_t known = std::min(sequence.tokens.size(), num_known) / kKvBlock;
  for (; full < known; ++full) make_known(sequence, full);
}

size_t KvCache::ContentHash::operator()(const Content& content) const {
  uint64_t hash = mix(content.before) + content.prompt_length;
  for (int32_t token : content.tokens) hash = mix(hash ^ static_cast<uint32_t>(token));
  return static_cast<size_t>(hash);
}

// Of the block that is the sequence's `index`-th, with these tokens. Those before it are known.
KvCache::Content KvCache::content_of(const Sequence& sequence, size_t index, const int32_t* tokens) const {
  Content content{};
  content.before = index ? blocks_[sequence.blocks[index - 1]].name : 0;
  size_t first = index * kKvBlock;
  if (has_phases_ && sequence.prompt_length > first)
    content.prompt_length = std::min(sequence.prompt_length - first, kKvBlock);
  std::copy_n(tokens, kKvBlock, content.tokens.begin());
  return content;
}

// A block that has become full can be found from now on. If another holds the same, which is the same bits,
// one of the two is enough.
void KvCache::make_known(Sequence& sequence, size_t index) {
  if (index > 0 && !blocks_[sequence.blocks[index - 1]].name) return;  // there was no memory to know it
  size_t& block = sequence.blocks[index];
  Content content = content_of(sequence, index, &sequence.tokens[index * kKvBlock]);
  auto [found, is_new] = index_.try_emplace(content, block);
  if (is_new) {
    blocks_[block].name = next_name_++;
    blocks_[block].content = &found->first;
  } else {
    hold_block(found->second);
    drop_block(std::exchange(block, found->second));
  }
}

// Before a write: a block that others hold, or may find, stays as it is. Where there is no room for a copy of
// one that nobody else holds, it is forgotten instead; what follows it is then held by nobody, nor idle.
void KvCache::make_writable(size_t& block) {
  bool is_shared = blocks_[block].references > 1;
  if (!is_shared && !blocks_[block].name) return;
  if (!is_shared && num_free_blocks() == 0) return forget(block);
  size_t own = take_block();
  std::memcpy(blocks_[own].data.get(), blocks_[block].data.get(), block_bytes_);
  drop_block(std::exchange(block, own));
}

void KvCache::forget(size_t block) {
  index_.erase(index_.find(*blocks_[block].content));
  blocks_[block].content = nullptr;
  blocks_[block].name = 0;
}

size_t KvCache::take_block() {
  size_t block = unused_block();
  blocks_[block].references = 1;
  ++num_used_;
  return block;
}

// Of those that were made, before new memory; an idle one only if it must be, or if they are many.
size_t KvCache::unused_block() {
  if (!free_.empty()) {
    size_t block = free_.back();
    free_.pop_back();
    return block;
  }
  bool has_many_idle = !idle_.empty() && idle_.size() * block_bytes_ >= idle_bytes_;
  if (blocks_.size() < capacity_ && !has_many_idle) {
    blocks_.push_back({make_buffer<uint8_t>(block_bytes_), 0, 0, nullptr, {}});
    return blocks_.size() - 1;
  }
  size_t block = idle_.front();
  idle_.pop_front();
  forget(block);
  return block;
}

void KvCache::hold_block(size_t block) {
  if (blocks_[block].references++ > 0) return;
  idle_.erase(blocks_[block].idle);
  ++num_used_;
}

void KvCache::drop_block(size_t block) {
  if (--blocks_[block].references > 0) return;
  --num_used_;
  if (blocks_[block].name)
    blocks_[block].idle = idle_.insert(idle_.end(), block);
  else
    free_.push_back(block);
}

}  // namespace relufy
