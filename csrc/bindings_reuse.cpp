// Neuron reuse in the Python module: its settings, and sequences that have them.
#include "bindings.h"

namespace relufy::bindings {
namespace {

void make_reuse(ReuseSettings* self, const std::string& policy, size_t period, size_t window, double share,
                bool resets, double most_missed, bool is_control) {
  using Policy = ReuseSettings::Policy;
  const std::pair<const char*, Policy> names[] = {{"window", Policy::window},
                                                  {"prompt", Policy::prompt},
                                                  {"blocks", Policy::blocks},
                                                  {"adaptive", Policy::adaptive}};
  for (auto [known, value] : names)
    if (policy == known) {
      new (self) ReuseSettings{value, period, window, share, resets, most_missed, is_control};
      return;
    }
  throw std::invalid_argument("there is no reuse policy '" + policy + "'");
}

}  // namespace

SequenceId new_sequence(Engine& engine, size_t prompt_length, const std::optional<ReuseSettings>& reuse,
                        size_t num_open) {
  if (!reuse) return engine.new_sequence(prompt_length);
  Reuse::Shape shape{engine.decoder().num_layers, engine.decoder().intermediate_size};
  return engine.new_sequence(prompt_length, std::make_unique<Reuse>(shape, *reuse, num_open));
}

SequenceId fork_sequence(Engine& engine, SequenceId parent, const std::optional<ReuseSettings>& reuse) {
  if (!reuse) return engine.fork(parent);
  return engine.fork(parent, [&](const ActiveSetPolicy* own, size_t length) {
    auto kept = dynamic_cast<const Reuse*>(own);
    if (!kept)
      throw std::invalid_argument("only a sequence with reuse can be forked to other settings of it");
    return kept->with(*reuse, length);
  });
}

void bind_reuse(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<ReuseSettings>(module, "Reuse")
      .def("__init__", &make_reuse, "policy"_a, "period"_a, "window"_a, "share"_a, "resets"_a,
           "most_missed"_a, "is_control"_a);
}

}  // namespace relufy::bindings
