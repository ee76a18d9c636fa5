// The predictor of a layer: few products of the MLP's input say which neurons may be active.
//
// reduced = inner x is made once for a token, by all threads; then each partition scores its own neurons and
// computes those that reach their thresholds. A token's scores are the same bits whoever shares its step.
#include <algorithm>

#include "engine.h"

namespace relufy {

bool Engine::predicts(const Layer& layer, const Token& token) const {
  return layer.predictor && token.policy && token.place.position >= decoder_.predictor_dense_first &&
         token.policy->predicts(token.place.position);
}

bool Engine::predicts_any(const Layer& layer, std::span<const Token> tokens) const {
  return std::any_of(tokens.begin(), tokens.end(), [&](const Token& t) { return predicts(layer, t); });
}

// Every thread finds the same tokens, so that all go through the phases or none does.
void Engine::reduce_inputs(const Layer& layer, std::span<const Token> tokens, Team& team) {
  if (!predicts_any(layer, tokens)) return;
  const NeuronPredictor& predictor = layer.predictor;
  const Projection inner{&predictor.inner, &inputs_[0], reduced_.x.get(), reduced_.width};
  project({&inner, 1}, tokens.size(), team);
  team.for_each(tokens.size(), [&](size_t t) {
    float* x = &reduced_.x[t * reduced_.width];
    std::fill(x + predictor.inner.outputs, x + reduced_.width, 0.0f);
    if (is_integer(predictor.outer.dtype)) quantise(reduced_, t);
  });
  if (tokens.size() >= kFewestForTiles) lay_out(reduced_, tokens.size(), team, [] {});
}

// Scores of a part's neurons, and the sets of those that reach their thresholds.
void Engine::predict_part(const Layer& layer, const Part& part, Scratch& scratch) {
  const NeuronPredictor& predictor = layer.predictor;
  if (!predicts_any(layer, part.all)) return;
  StoredRows rows = predictor.outer;
  rows.data += part.first * rows.stride;
  if (rows.scales) rows.scales += part.first;
  float* scores = &gates_[part.first];  // the gate's own outputs come later
  kernels_.dot(rows, nullptr, 0, part.neurons, reduced_.input(), part.tokens, scratch.products.get(), scores,
               neuron_width_);
  scratch.weight_bytes += part.neurons * (rows.stride + rows.scale_bytes());
  for (size_t t = 0; t < part.tokens; ++t)
    if (predicts(layer, part.all[t]))
      kernels_.reach(scores + t * neuron_width_, predictor.thresholds + part.first, part.neurons,
                     &predicted_[t * set_words(neuron_width_) + part.first / 64]);
}

}  // namespace relufy
