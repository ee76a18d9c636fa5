// The memory of a step: made for a few tokens at first, and for more when a longer step comes.
#include <algorithm>
#include <bit>

#include "engine.h"

namespace relufy {

template <class Condition>
bool Engine::has_matrix(Condition&& condition) const {
  bool any = condition(decoder_.head);
  for (const Layer& l : decoder_.layers)
    for (const Matrix* m : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down, &l.predictor.inner})
      any = any || condition(*m);
  return any;
}

Engine::Vectors Engine::make_vectors(size_t width, size_t tokens) const {
  Vectors v;
  v.width = width;
  v.x = make_buffer<float>(tokens * width);
  v.list = make_buffer<uint32_t>(width + 16);
  v.scale = make_buffer<float>(tokens);
  v.sum = make_buffer<int64_t>(tokens);
  if (has_matrix([](const Matrix& m) { return is_integer(m.stored.dtype); })) {
    v.high = make_buffer<int8_t>(tokens * width);
    v.low = make_buffer<int8_t>(tokens * width);
    v.pairs = make_buffer<int16_t>(tokens * width);
    v.groups = make_buffer<int16_t>(2 * tokens * width);
  }
  if (tokens >= kFewestForTiles &&
      has_matrix([](const Matrix& m) { return !m.is_columns() && !is_integer(m.stored.dtype); }))
    v.tiles = make_buffer<float>(round_up_quotient(tokens, kTileTokens) * tile_size(width));
  if (decoder_.max_rank > 0) {
    v.residual = make_buffer<float>(tokens * width);
    v.low_rank = make_buffer<float>(tokens * padded(decoder_.max_rank));
  }
  return v;
}

void Engine::allocate() {
  const Decoder& d = decoder_;
  width_ = padded(d.hidden_size);
  query_width_ = padded(d.num_heads * d.head_dim);
  key_width_ = padded(d.num_kv_heads * d.head_dim);
  neuron_width_ = padded(d.intermediate_size);
  size_t most = std::max({width_, query_width_, neuron_width_});
  all_ = make_buffer<uint32_t>(most);
  for (size_t i = 0; i < most; ++i) all_[i] = static_cast<uint32_t>(i);
  for (size_t i = 0; i < pool_.size(); ++i) {
    Scratch scratch;
    scratch.head = make_buffer<float>(padded(d.head_dim));
    scratch.list = make_buffer<uint32_t>(d.neurons_per_partition + 16);
    scratch.neurons = make_buffer<uint32_t>(d.neurons_per_partition + 16);
    scratch.active = make_buffer<uint64_t>(set_words(d.intermediate_size));
    scratch.keys.reserve(2 * most);
    if (d.max_rank > 0) scratch.correction = make_buffer<float>(kFewTokens * most);
    for (auto& by_layer : scratch.used) by_layer.resize(d.num_layers);
    scratch.candidates.resize(d.num_layers);
    scratch.fired.resize(d.num_layers);
    scratch_.push_back(std::move(scratch));
  }
  make_room(kFewTokens);
  make_scores(std::min({context_, d.max_context, kFirstPositions}));
  reset_stats();
}

// A prompt's memory is many times a token's, and many engines never see a long one.
void Engine::make_room(size_t tokens) {
  if (tokens <= room_) return;
  const Decoder& d = decoder_;
  size_t room = std::min(kMostTokens, std::bit_ceil(tokens));
  room_ = 0;  // should memory run out half way
  hidden_ = make_buffer<float>(room * width_);
  normed_ = make_buffer<float>(room * width_);
  projected_ = make_buffer<float>(room * width_);
  queries_ = make_buffer<float>(room * query_width_);
  keys_ = make_buffer<float>(room * key_width_);
  values_ = make_buffer<float>(room * key_width_);
  attended_ = make_buffer<float>(room * query_width_);
  gates_ = make_buffer<float>(room * neuron_width_);
  ups_ = make_buffer<float>(room * neuron_width_);
  bool has_partials = false, has_products = false;
  for (const Layer& layer : d.layers) (layer.has_partial_down() ? has_partials : has_products) = true;
  if (has_partials) partials_ = make_buffer<float>(d.num_partitions() * room * width_);
  if (has_products) products_ = make_vectors(neuron_width_, room);
  cosines_ = make_buffer<float>(room * d.ropes.size() * d.head_dim / 2);
  sines_ = make_buffer<float>(room * d.ropes.size() * d.head_dim / 2);
  if (d.is_parallel) before_ = make_buffer<float>(room * width_);
  for (Vectors& v : inputs_) v = make_vectors(std::max(width_, query_width_), room);
  if (d.predictor_rank > 0) {
    reduced_ = make_vectors(padded(d.predictor_rank), room);
    predicted_ = make_buffer<uint64_t>(room * set_words(neuron_width_));
  }
  size_t most = std::max({width_, query_width_, neuron_width_});
  for (Scratch& scratch : scratch_)
    scratch.products = make_buffer<uint8_t>(std::max(dot_scratch(most, room), scatter_scratch(most, room)));
  room_ = room;
}

// Attention's scratch grows with the sequences: a model's context may be far more than what is used of it.
void Engine::make_scores(size_t positions) {
  if (positions <= score_positions_) return;
  size_t room = round_up(std::max(positions, 2 * score_positions_), kKvBlock);
  for (Scratch& scratch : scratch_) {
    scratch.scores = make_buffer<float>(4 * room);
    scratch.blocks = make_buffer<const uint8_t*>(room / kKvBlock);
  }
  score_positions_ = room;
}

}  // namespace relufy
