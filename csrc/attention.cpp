// Attention of a chunk of tokens: projections, the KV cache's new positions, and each head's look at its
// past.
#include <algorithm>

#include "engine.h"

namespace relufy {
namespace {

constexpr size_t kAttendedTokens = 8;  // in a task of attention

}  // namespace

void Engine::attention(const Layer& layer, size_t index, std::span<const Token> tokens, Team& team) {
  const Matrix* readers[] = {&layer.q, &layer.k, &layer.v};
  Vectors* x[] = {&inputs_[0], &inputs_[layer.k_shares_q ? 0 : 1], &inputs_[layer.v_shares_q ? 0 : 2]};
  bool others_quantise =
      (layer.k_shares_q && layer.k.reads_integers()) || (layer.v_shares_q && layer.v.reads_integers());
  auto list = [&] {
    Use before = stats_.used[kQ][index];
    for (size_t i = 0; i < 3; ++i) {
      if (x[i] == &inputs_[i])
        list_inputs(*x[i], *readers[i], tokens.size(), stats_.used[kQ + i], index);
      else
        stats_.used[kQ + i][index] += stats_.used[kQ][index] - before;
    }
    stats_.weight_bytes += norm_bytes(layer.attention_norm) + norm_bytes(layer.attention_output_norm);
  };
  team.for_each(tokens.size(), [&](size_t t) {
    if (decoder_.is_parallel) std::copy_n(&hidden_[t * width_], width_, &before_[t * width_]);
    normalise_token(layer.attention_norm, &hidden_[t * width_], &normed_[t * width_]);
    for (size_t i = 0; i < 3; ++i)
      if (x[i] == &inputs_[i])
        fill(*x[i], *readers[i], tokens[t].place, t, &normed_[t * width_], scratch_[team.thread()],
             i == 0 && others_quantise);
    if (tokens.size() == 1) list();
  });
  if (tokens.size() > 1) {
    Vectors* filled[3];
    size_t count = 0;
    for (size_t i = 0; i < 3; ++i)
      if (x[i] == &inputs_[i]) filled[count++] = x[i];
    lay_out({filled, count}, tokens.size(), team, list);
  }

  const Projection projections[] = {{&layer.q, x[0], queries_.get(), query_width_},
                                    {&layer.k, x[1], keys_.get(), key_width_},
                                    {&layer.v, x[2], values_.get(), key_width_}};
  project(projections, tokens.size(), team);
  if (decoder_.query_norm == QueryNorm::whole) normalise_queries(layer, tokens.size(), team);
  size_t heads = decoder_.num_kv_heads, groups = round_up_quotient(tokens.size(), kAttendedTokens);
  auto attend = [&](size_t head, size_t group) {
    size_t first = group * kAttendedTokens, count = std::min(kAttendedTokens, tokens.size() - first);
    attend_head(layer, index, head, tokens.subspan(first, count), first, scratch_[team.thread()]);
  };
  team.for_each(heads, [&](size_t head) {
    write_head(layer, index, head, tokens, scratch_[team.thread()]);
    if (groups == 1) attend(head, 0);
  });
  if (groups > 1) team.for_each(heads * groups, [&](size_t task) { attend(task / groups, task % groups); });

  Vectors& attended = inputs_[0];
  team.for_each(tokens.size(), [&](size_t t) {
    fill(attended, layer.o, tokens[t].place, t, &attended_[t * query_width_], scratch_[team.thread()]);
    if (tokens.size() == 1) list_inputs(attended, layer.o, 1, stats_.used[kO], index);
  });
  if (tokens.size() > 1)
    lay_out(attended, tokens.size(), team,
            [&] { list_inputs(attended, layer.o, tokens.size(), stats_.used[kO], index); });
  bool has_output_norm{layer.attention_output_norm};
  const Projection output{&layer.o, &attended, projected_.get(), width_, !has_output_norm};
  project({&output, 1}, tokens.size(), team);
  if (has_output_norm)
    team.for_each(tokens.size(), [&](size_t t) { add_normalised(layer.attention_output_norm, t); });
}

// The norms of all heads' queries, and of all heads' keys, together.
void Engine::normalise_queries(const Layer& layer, size_t tokens, Team& team) {
  size_t queries = decoder_.num_heads * decoder_.head_dim, keys = decoder_.num_kv_heads * decoder_.head_dim;
  team.for_each(tokens, [&](size_t t) {
    float *q = &queries_[t * query_width_], *k = &keys_[t * key_width_];
    std::fill(q + queries, q + query_width_, 0.0f);
    std::fill(k + keys, k + key_width_, 0.0f);
    normalise(layer.q_norm, q, queries, q);
    normalise(layer.k_norm, k, keys, k);
  });
}

// A query or key, as it came from its projection, as attention needs it.
void Engine::prepare_head(const Norm& norm, const Layer& layer, size_t t, float* head,
                          Scratch& scratch) const {
  size_t head_dim = decoder_.head_dim;
  if (decoder_.query_norm == QueryNorm::head) {
    float* alone = scratch.head.get();
    std::copy_n(head, head_dim, alone);
    std::fill(alone + head_dim, alone + padded(head_dim), 0.0f);
    normalise(norm, alone, head_dim, alone);
    std::copy_n(alone, head_dim, head);
  }
  if (!layer.rotary) return;
  size_t table = t * decoder_.ropes.size() + static_cast<size_t>(layer.rotary - decoder_.ropes.data());
  size_t at = table * (head_dim / 2);
  kernels_.rotate(&cosines_[at], &sines_[at], 2 * layer.rotary->half, head);
}

void Engine::write_kv(size_t layer, size_t kv_head, const Token& token, size_t t) {
  size_t head_dim = decoder_.head_dim, slot = token.place.position % kKvBlock;
  uint8_t* part = kv_.part(token.blocks[token.place.position / kKvBlock], layer, kv_head);
  const float* key = &keys_[t * key_width_ + kv_head * head_dim];
  const float* value = &values_[t * key_width_ + kv_head * head_dim];
  auto write = [&](auto* to, auto narrow) {
    for (size_t i = 0; i < head_dim; ++i) to[i * kKvBlock + slot] = narrow(key[i]);
    auto* values = to + head_dim * kKvBlock + slot * kv_width(head_dim);
    for (size_t i = 0; i < head_dim; ++i) values[i] = narrow(value[i]);
  };
  if (kv_.dtype() == Dtype::f32)
    write(reinterpret_cast<float*>(part), [](float x) { return x; });
  else if (kv_.dtype() == Dtype::bf16)
    write(reinterpret_cast<uint16_t*>(part), bf16_of);
  else
    write(reinterpret_cast<uint16_t*>(part), f16_of);
}

// The new positions of one KV head.
void Engine::write_head(const Layer& layer, size_t index, size_t kv_head, std::span<const Token> tokens,
                        Scratch& scratch) {
  for (size_t t = 0; t < tokens.size(); ++t) {
    prepare_head(layer.k_norm, layer, t, &keys_[t * key_width_ + kv_head * decoder_.head_dim], scratch);
    write_kv(index, kv_head, tokens[t], t);
  }
}

// One KV head and the query heads that share it, for some tokens, of which the first is `first_token`.
void Engine::attend_head(const Layer& layer, size_t index, size_t kv_head, std::span<const Token> tokens,
                         size_t first_token, Scratch& scratch) {
  size_t head_dim = decoder_.head_dim, count = decoder_.num_heads / decoder_.num_kv_heads;
  size_t first = count * kv_head;
  Attention a{scratch.blocks.get(), 0, head_dim, count, head_dim, kv_.dtype(), decoder_.attention_scale};
  a.softcap = decoder_.attention_softcap;
  if (decoder_.alibi_slopes)
    a.alibi = {decoder_.alibi_slopes + first, 0, decoder_.alibi_rounds ? decoder_.attention_scale : 1.0f,
               decoder_.alibi_rounds};
  for (size_t i = 0; i < tokens.size(); ++i) {
    size_t t = first_token + i;
    size_t end = tokens[i].place.position + 1, begin = end > layer.window ? end - layer.window : 0;
    size_t skipped = begin / kKvBlock, num_blocks = round_up_quotient(end, kKvBlock) - skipped;
    a.first = begin % kKvBlock;
    a.length = end - skipped * kKvBlock;
    a.alibi.start = skipped * kKvBlock;
    for (size_t b = 0; b < num_blocks; ++b)
      scratch.blocks[b] = kv_.part(tokens[i].blocks[skipped + b], index, kv_head);
    float* queries = &queries_[t * query_width_ + first * head_dim];
    for (size_t q = 0; q < count; ++q) prepare_head(layer.q_norm, layer, t, queries + q * head_dim, scratch);
    kernels_.attend(a, queries, scratch.scores.get(), &attended_[t * query_width_ + first * head_dim]);
    scratch.kv_bytes +=
        (num_blocks * kKvBlock * head_dim + (end - begin) * kv_width(head_dim)) * kv_.element_bytes();
  }
}

}  // namespace relufy
