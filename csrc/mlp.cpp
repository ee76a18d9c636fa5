// The MLP: activation, active neurons, and the rows of up and columns of down that they need.
//
// Neurons are cut into partitions. A thread goes through each that it claims: gate -> activation -> list,
// then up -> product -> list -> down, into a sum of the partition's own. The second half waits for the gate
// of the next partition, beside which the listed rows are fetched. Functions that need all neurons at once
// (top-k) split the MLP in two.
#include <algorithm>

#include "engine.h"

namespace relufy {
namespace {

bool is_plain_rows(const Matrix& m) { return !m.is_columns() && m.rank == 0; }

constexpr size_t kShortRow = 3072;          // bytes: gathered rows up to here are fetched beside a stream
constexpr size_t kSliceRows = 4;            // of the stream, between two shares of what is fetched
constexpr size_t kListedRows = 32;          // the same of a list, whose kernel looks a few rows ahead
constexpr size_t kFirstListed = 4;          // so many, which the last slice's call did not see coming
constexpr size_t kMostFetched = 512 << 10;  // bytes: what the second cache holds beside the rest

// Listed rows on their way to the second cache, a share at a time. Short rows that are gathered arrive at
// half the speed of a stream: fetched beside one, they cost no more than their bytes (int4: 3 % of a token;
// rows of 4 KB and more gain nothing).
struct Fetch {
  StoredRows rows;
  const uint32_t* list = nullptr;
  size_t lines_per_row = 1, lines = 0, done = 0;

  Fetch(const StoredRows& w, const uint32_t* listed, size_t count)
      : rows(w), list(listed), lines_per_row(w.stride / 64) {
    if (w.stride <= kShortRow) lines = std::min(count * lines_per_row, kMostFetched / 64);
  }

  void share(size_t num_shares) {
    size_t end = std::min(lines, done + round_up_quotient(lines, num_shares));
    for (; done < end; ++done)
      __builtin_prefetch(rows.row(list[done / lines_per_row]) + done % lines_per_row * 64, 0, 2);
  }
};

// The first of a list's rows on their way: the kernels fetch those of a list that they see, of integers
// alone.
void fetch_first(const StoredRows& w, const uint32_t* list, size_t count) {
  if (!is_integer(w.dtype)) return;
  for (size_t i = 0; i < std::min(count, kFirstListed); ++i)
    for (size_t at = 0; at < w.stride; at += 64) __builtin_prefetch(w.row(list[i]) + at, 0, 2);
}

// The rows of a matrix that belong to a part.
StoredRows rows_from(const StoredRows& w, size_t first) {
  StoredRows part = w;
  part.data += first * w.stride;
  if (part.scales) part.scales += first;
  return part;
}

}  // namespace

Engine::Part Engine::part_of(size_t partition, std::span<const Token> tokens) const {
  size_t first = partition * decoder_.neurons_per_partition;
  size_t neurons = std::min(decoder_.neurons_per_partition, decoder_.intermediate_size - first);
  return {partition, first, neurons, tokens.size(), tokens};
}

void Engine::mlp(const Layer& layer, size_t index, std::span<const Token> tokens, Team& team) {
  mlp_inputs(layer, index, tokens, team);
  reduce_inputs(layer, tokens, team);
  Projection projections[2];
  size_t count = 0;
  if (!is_plain_rows(layer.first()) || layer.has_global_neurons())
    projections[count++] = {&layer.first(), &inputs_[0], gates_.get(), neuron_width_};
  if (layer.is_gated && !layer.has_bundle && !is_plain_rows(layer.up)) {
    projections[count++] = {&layer.up, &inputs_[layer.up_shares_gate ? 0 : 1], ups_.get(), neuron_width_};
  }
  if (count > 0) project({projections, count}, tokens.size(), team);
  if (layer.has_global_neurons())
    team.for_each(tokens.size(),
                  [&](size_t t) { whole_neurons(layer, tokens[t], t, scratch_[team.thread()]); });

  bool down_waits = layer.has_partial_down() && layer.down.mask.is_global();
  Scratch& own = scratch_[team.thread()];
  Part waiting{};  // whose active neurons are listed
  auto finish = [&] {
    if (layer.is_gated) up_part(layer, index, waiting, own);
    if (layer.has_partial_down() && !down_waits) down_part(layer, index, waiting, own);
    waiting = {};
  };
  team.for_each(
      decoder_.num_partitions(),
      [&](size_t p) {
        Part part = part_of(p, tokens);
        neuron_part(layer, index, part, waiting, own);
        if (waiting.neurons > 0) finish();
        waiting = part;
        list_neurons(layer, index, waiting, own);
      },
      finish);
  if (down_waits) {
    team.for_each(tokens.size(), [&](size_t t) {
      float* a = &gates_[t * neuron_width_];
      select_whole(layer.down.mask, tokens[t].place, a, decoder_.intermediate_size, a,
                   scratch_[team.thread()].keys);
    });
    team.for_each(decoder_.num_partitions(),
                  [&](size_t p) { down_part(layer, index, part_of(p, tokens), scratch_[team.thread()]); });
  }
  add_sums(tokens, index, team);
  bool has_output_norm{layer.mlp_output_norm};
  team.for_each(tokens.size(), [&](size_t t) {
    if (tokens[t].policy) collect_active(tokens[t], index, t, scratch_[team.thread()]);
    float* sum = has_output_norm ? &projected_[t * width_] : &hidden_[t * width_];
    if (layer.has_partial_down()) {
      if (has_output_norm) std::fill_n(sum, width_, 0.0f);
      kernels_.add_partials(&partials_[t * width_], room_ * width_, decoder_.num_partitions(), width_, sum);
      if (layer.down.bias) kernels_.add(layer.down.bias, sum, width_);
      if (has_output_norm) add_normalised(layer.mlp_output_norm, t);
    } else {
      fill(products_, layer.down, tokens[t].place, t, &gates_[t * neuron_width_], scratch_[team.thread()]);
    }
  });
  if (layer.has_partial_down()) return;
  lay_out(products_, tokens.size(), team, [&] {
    Use before = stats_.used[kDown][index];
    list_inputs(products_, layer.down, tokens.size(), stats_.used[kDown], index);
    if (!layer.is_gated) stats_.used[kNeuron][index] += stats_.used[kDown][index] - before;
  });
  const Projection down{&layer.down, &products_, projected_.get(), width_, !has_output_norm};
  project({&down, 1}, tokens.size(), team);
  if (has_output_norm)
    team.for_each(tokens.size(), [&](size_t t) { add_normalised(layer.mlp_output_norm, t); });
}

// The norm, and the masked inputs of gate and up.
void Engine::mlp_inputs(const Layer& layer, size_t index, std::span<const Token> tokens, Team& team) {
  bool has_own_up = layer.is_gated && !layer.up_shares_gate;
  auto list = [&] {
    Site first = layer.is_gated ? kGate : kUp;
    Use before = stats_.used[first][index];
    bool reads_columns = layer.predictor.inner.is_columns() && predicts_any(layer, tokens);
    const Matrix& reader = reads_columns ? layer.predictor.inner : layer.first();
    list_inputs(inputs_[0], reader, tokens.size(), stats_.used[first], index);
    if (has_own_up)
      list_inputs(inputs_[1], layer.up, tokens.size(), stats_.used[kUp], index);
    else if (layer.is_gated)
      stats_.used[kUp][index] += stats_.used[kGate][index] - before;
    else
      stats_.used[kGate][index] += {tokens.size() * decoder_.hidden_size, decoder_.hidden_size};
    stats_.weight_bytes += norm_bytes(layer.mlp_norm) + norm_bytes(layer.mlp_output_norm);
  };
  team.for_each(tokens.size(), [&](size_t t) {
    Scratch& scratch = scratch_[team.thread()];
    ActiveSetPolicy* policy = tokens[t].policy;
    candidates_[t] = policy ? policy->candidates(index, tokens[t].place.position) : nullptr;
    if (predicts(layer, tokens[t])) candidates_[t] = &predicted_[t * set_words(neuron_width_)];
    normalise_token(layer.mlp_norm, mlp_hidden(t), &normed_[t * width_]);
    bool up_quantises = layer.up.reads_integers();
    fill(inputs_[0], layer.first(), tokens[t].place, t, &normed_[t * width_], scratch,
         !has_own_up && up_quantises);
    if (has_own_up) fill(inputs_[1], layer.up, tokens[t].place, t, &normed_[t * width_], scratch);
    if (tokens.size() == 1) list();
  });
  Vectors* filled[] = {&inputs_[0], &inputs_[1]};
  if (tokens.size() > 1) lay_out({filled, has_own_up ? size_t{2} : 1}, tokens.size(), team, list);
}

// Activation and mask of a token's neurons where they need the whole vector.
void Engine::whole_neurons(const Layer& layer, const Token& token, size_t t, Scratch& scratch) {
  float* z = &gates_[t * neuron_width_];
  size_t n = decoder_.intermediate_size;
  if (layer.is_statistical) statistical_topk(z, n, layer.deviations);
  kernels_.activate(layer.activation, layer.shift, layer.cutoff, z, neuron_width_);
  if (layer.neuron) select_whole(layer.neuron, token.place, z, n, z, scratch.keys);
  std::fill(z + n, z + neuron_width_, 0.0f);
}

// gates <- activation(gate) for a part. The rows that the waiting part needs are fetched meanwhile.
void Engine::neuron_part(const Layer& layer, size_t index, const Part& part, const Part& waiting,
                         Scratch& scratch) {
  size_t rounded = round_up(part.neurons, 16);
  const Matrix& first = layer.first();
  if (layer.has_global_neurons()) return;
  predict_part(layer, part, scratch);
  if (is_plain_rows(first)) first_rows(layer, index, part, waiting, scratch);
  for (size_t t = 0; t < part.tokens; ++t) {
    float* z = &gates_[t * neuron_width_ + part.first];
    if (is_plain_rows(first) && first.bias) kernels_.add(first.bias + part.first, z, rounded);
    kernels_.activate(layer.activation, layer.shift, layer.cutoff, z, rounded);
    if (layer.neuron) select_part(layer.neuron, part.all[t].place, z, part.first, part.neurons, z);
    if (candidates_[t]) kernels_.keep_members(candidates_[t], part.first, rounded, z);
    std::fill(z + part.neurons, z + rounded, 0.0f);
  }
}

// The rows of a part's first matrix: of its neurons that are some token's candidates.
void Engine::first_rows(const Layer& layer, size_t index, const Part& part, const Part& waiting,
                        Scratch& scratch) {
  const Matrix& first = layer.first();
  size_t rows = list_candidates(first, index, part, scratch);
  size_t fetched = part.tokens < kPanelTokens ? waiting.listed : 0;  // more keep the processor busy
  Fetch fetch(rows_from(layer.up.stored, waiting.first), scratch.neurons.get(), fetched);
  bool is_all = rows == part.neurons;
  size_t slice = std::max<size_t>(rows, 1);
  if (fetch.lines > 0) slice = is_all ? kSliceRows : kListedRows;
  StoredRows listed = rows_from(first.stored, part.first);
  if (!is_all) fetch_first(listed, scratch.list.get(), rows);
  for (size_t i = 0; i < rows; i += slice) {
    size_t some = std::min(slice, rows - i);
    if (!is_all) fetch_first(listed, scratch.list.get() + i + some, rows - i - some);
    if (is_all)
      dot_rows(first, inputs_[0], part.first + i, some, part.tokens, gates_.get(), neuron_width_, scratch);
    else
      kernels_.dot(listed, scratch.list.get() + i, 0, some, inputs_[0].input(), part.tokens,
                   scratch.products.get(), &gates_[part.first], neuron_width_);
    fetch.share(round_up_quotient(rows, slice));
  }
  if (!is_all) scratch.weight_bytes += first.stored.listed_bytes(rows);
}

// Lists the candidates of the part's tokens, and returns how many; all, where a token has no policy.
size_t Engine::list_candidates(const Matrix& first, size_t index, const Part& part, Scratch& scratch) {
  const uint64_t* sets[kMostTokens];
  size_t limited = 0;
  for (size_t t = 0; t < part.tokens; ++t)
    if (candidates_[t]) sets[limited++] = candidates_[t];
  if (limited == 0) return part.neurons;
  Use& used = scratch.candidates[index];
  size_t listed =
      kernels_.list_members(sets, limited, part.first, part.neurons, scratch.list.get(), &used.by_token);
  bool is_all = limited < part.tokens || !skip_;
  float most =
      crossover_.share(Product::dot, first.stored.dtype, part.tokens) * static_cast<float>(part.neurons);
  used.together += limited < part.tokens ? part.neurons : listed;
  return is_all || static_cast<float>(listed) > most ? part.neurons : listed;
}

// What a policy asks of a token's neurons, which have been through the MLP.
void Engine::collect_active(const Token& token, size_t index, size_t t, Scratch& scratch) {
  uint64_t* set = token.policy->active(index, token.place.position);
  if (!set && !candidates_[t]) return;
  size_t active = kernels_.collect(&gates_[t * neuron_width_], decoder_.intermediate_size,
                                   set ? set : scratch.active.get());
  if (candidates_[t]) scratch.fired[index] += active;
  size_t first = token.policy->has_predictor() ? decoder_.first_predicted : 0;
  if (candidates_[t] && index == first) ++scratch.limited;
}

// Every thread finds the same tokens, so that all go through the phase or none does.
void Engine::add_sums(std::span<const Token> tokens, size_t index, Team& team) {
  auto has_sums = [](const Token& token) {
    return token.policy && token.policy->has_sums(token.place.position);
  };
  if (std::none_of(tokens.begin(), tokens.end(), has_sums)) return;
  team.for_each(1, [&](size_t) {
    for (size_t t = 0; t < tokens.size(); ++t)
      if (has_sums(tokens[t]))
        tokens[t].policy->add(index, tokens[t].place.position, &gates_[t * neuron_width_]);
  });
}

void Engine::list_neurons(const Layer& layer, size_t index, Part& part, Scratch& scratch) {
  if (!layer.has_bundle) return;
  part.listed = list_needed(Product::dot, layer.up.stored.dtype, &gates_[part.first], neuron_width_,
                            part.tokens, part.neurons, scratch.neurons.get(), scratch.used[kNeuron][index]);
}

// gates <- gates * up for a part, with the bias of each.
void Engine::up_part(const Layer& layer, size_t index, const Part& part, Scratch& scratch) {
  size_t rounded = round_up(part.neurons, 16), listed = part.listed;
  const Matrix& up = layer.up;
  const Vectors& x = inputs_[layer.up_shares_gate ? 0 : 1];
  float *gates = &gates_[part.first], *ups = &ups_[part.first];
  if (layer.has_bundle) {
    const uint32_t* list = scratch.neurons.get();
    bool is_all = listed == part.neurons;
    kernels_.dot(rows_from(up.stored, part.first), is_all ? nullptr : list, 0, listed, x.input(), part.tokens,
                 scratch.products.get(), ups, neuron_width_);
    scratch.weight_bytes += up.stored.listed_bytes(listed);
    for (size_t t = 0; up.bias && t < part.tokens; ++t)
      for (size_t j = 0; j < listed; ++j) ups[t * neuron_width_ + list[j]] += up.bias[part.first + list[j]];
  } else if (is_plain_rows(up)) {
    dot_rows(up, x, part.first, part.neurons, part.tokens, ups_.get(), neuron_width_, scratch);
    for (size_t t = 0; up.bias && t < part.tokens; ++t)
      kernels_.add(up.bias + part.first, ups + t * neuron_width_, rounded);
  }
  if (!layer.has_bundle) scratch.used[kNeuron][index] += {part.tokens * part.neurons, part.neurons};
  for (size_t t = 0; t < part.tokens; ++t) {
    if (layer.up_relu) kernels_.activate(Activation::relu, 0.0f, 0.0f, ups + t * neuron_width_, rounded);
    kernels_.multiply(gates + t * neuron_width_, ups + t * neuron_width_, gates + t * neuron_width_, rounded);
  }
}

// The part's share of down's output, from the neurons that are left.
void Engine::down_part(const Layer& layer, size_t index, const Part& part, Scratch& scratch) {
  const Matrix& down = layer.down;
  float* a = &gates_[part.first];
  for (size_t t = 0; down.mask && !down.mask.is_global() && t < part.tokens; ++t) {
    float* products = a + t * neuron_width_;
    select_part(down.mask, part.all[t].place, products, part.first, part.neurons, products);
  }
  Use used;
  size_t listed = list_needed(Product::scatter, down.stored.dtype, a, neuron_width_, part.tokens,
                              part.neurons, scratch.list.get(), used);
  scratch.used[kDown][index] += used;
  if (!layer.is_gated) scratch.used[kNeuron][index] += used;
  kernels_.scatter(rows_from(down.stored, part.first), 0, down.stored.width(), scratch.list.get(), listed, a,
                   neuron_width_, part.tokens, scratch.products.get(),
                   &partials_[part.index * room_ * width_], width_);
  scratch.weight_bytes += down.stored.listed_bytes(listed);
}

}  // namespace relufy
