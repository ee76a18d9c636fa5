// A chunk of tokens on its way through the layers.
#include <algorithm>
#include <cmath>

#include "engine.h"

namespace relufy {
namespace {

constexpr size_t kTaskLogits = 4096;

}  // namespace

void Engine::forward(std::span<const Token> tokens, float* logits, Team& team) {
  embed(tokens, team);
  for (size_t i = 0; i < decoder_.num_layers; ++i) {
    attention(decoder_.layers[i], i, tokens, team);
    mlp(decoder_.layers[i], i, tokens, team);
  }
  head(tokens, logits, team);
}

void Engine::embed(std::span<const Token> tokens, Team& team) {
  size_t half = decoder_.head_dim / 2, tables = decoder_.ropes.size();
  team.for_each(tokens.size(), [&](size_t t) {
    float* x = &hidden_[t * width_];
    kernels_.expand(decoder_.embedding.stored, static_cast<size_t>(tokens[t].id), x);
    for (size_t i = 0; decoder_.embedding_scale != 1.0f && i < width_; ++i) x[i] *= decoder_.embedding_scale;
    if (decoder_.positions == Positions::learned) {
      kernels_.expand(decoder_.position_embedding, tokens[t].place.position, &normed_[t * width_]);
      kernels_.add(&normed_[t * width_], x, width_);
    }
    for (size_t table = 0; table < tables; ++table) {
      const Rope& rope = decoder_.ropes[table];
      float *cosines = &cosines_[(t * tables + table) * half], *sines = &sines_[(t * tables + table) * half];
      for (size_t i = 0; i < rope.half; ++i) {
        float angle = static_cast<float>(tokens[t].place.position) * rope.frequencies[i];
        cosines[i] = static_cast<float>(std::cos(static_cast<double>(angle))) * rope.scale;
        sines[i] = static_cast<float>(std::sin(static_cast<double>(angle))) * rope.scale;
      }
    }
    if (t == 0) stats_.weight_bytes += tokens.size() * decoder_.embedding.stored.stride;
  });
}

// y <- norm(x), or x where there is no norm; y may be x. Both are padded with zeros.
void Engine::normalise(const Norm& norm, const float* x, size_t n, float* y) const {
  if (!norm) {
    if (y != x) std::copy_n(x, padded(n), y);
  } else if (norm.bias) {
    kernels_.layer_norm(x, norm.weight, norm.bias, decoder_.norm_eps, n, y);
  } else {
    kernels_.rms_norm(x, norm.weight, decoder_.norm_eps, n, y);
  }
}

void Engine::normalise_token(const Norm& norm, const float* x, float* y) const {
  normalise(norm, x, decoder_.hidden_size, y);
}

// hidden <- hidden + norm(projected), of a token.
void Engine::add_normalised(const Norm& norm, size_t t) {
  float* made = &projected_[t * width_];
  std::fill(made + decoder_.hidden_size, made + width_, 0.0f);
  normalise_token(norm, made, made);
  kernels_.add(made, &hidden_[t * width_], width_);
}

void Engine::head(std::span<const Token> tokens, float* logits, Team& team) {
  size_t wanted[kMostTokens], count = 0;
  for (size_t t = 0; t < tokens.size(); ++t)
    if (tokens[t].wants_logits) wanted[count++] = t;
  if (count == 0) return;
  Vectors& x = inputs_[0];
  team.for_each(count, [&](size_t i) {
    normalise_token(decoder_.final_norm, &hidden_[wanted[i] * width_], &normed_[i * width_]);
    fill(x, decoder_.head, tokens[wanted[i]].place, i, &normed_[i * width_], scratch_[team.thread()]);
    if (i == 0) stats_.weight_bytes += width_ * sizeof(float);
  });
  if (count >= kFewestForTiles) lay_out(x, count, team, [] {});
  const Projection projection{&decoder_.head, &x, logits, decoder_.vocab_size};
  project({&projection, 1}, count, team);
  if (decoder_.final_softcap == 0.0f) return;
  size_t total = count * decoder_.vocab_size;
  team.for_each(round_up_quotient(total, kTaskLogits), [&](size_t task) {
    size_t first = task * kTaskLogits;
    kernels_.soft_cap(decoder_.final_softcap, logits + first, std::min(kTaskLogits, total - first));
  });
}

}  // namespace relufy
