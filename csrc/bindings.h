// What the files of the Python module share: numpy arrays as arguments, choices as results.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <vector>

#include "engine.h"
#include "reuse.h"

namespace relufy::bindings {

namespace nb = nanobind;

using Tokens = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ids = std::vector<int32_t>;

// A copy, for the caller may write to its arrays while the GIL is released.
inline Ids copied(const Tokens& tokens) { return {tokens.data(), tokens.data() + tokens.size()}; }

// (token, logprob, top), as relufy.engine.sampling.Chosen has them.
inline nb::tuple as_tuple(const Choice& choice) {
  nb::list top;
  for (auto [token, logprob] : choice.top) top.append(nb::make_tuple(token, logprob));
  return nb::make_tuple(choice.token, choice.logprob, nb::tuple(top));
}

inline nb::list as_list(const std::vector<Choice>& choices) {
  nb::list result;
  for (const Choice& choice : choices) result.append(as_tuple(choice));
  return result;
}

nb::dict as_dict(const Stats& stats);

void bind_speculator(nb::module_& module);
void bind_reuse(nb::module_& module);

// `reuse`, of tokens from `num_open` on, if there is any.
SequenceId new_sequence(Engine& engine, size_t prompt_length, const std::optional<ReuseSettings>& reuse,
                        size_t num_open);
SequenceId fork_sequence(Engine& engine, SequenceId parent, const std::optional<ReuseSettings>& reuse);

}  // namespace relufy::bindings
