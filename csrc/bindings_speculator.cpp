// Speculative decoding in the Python module.
#include "bindings.h"
#include "speculator.h"

using namespace nanobind::literals;

namespace relufy::bindings {
namespace {

using Released = nb::call_guard<nb::gil_scoped_release>;

// `draft` is another engine, or none: then the engine drafts for itself from the neurons of the last `window`
// tokens, or where that is 0, proposals are looked up in the text.
void make_speculator(Speculator* self, Engine& engine, Engine* draft, size_t gamma, bool is_adaptive,
                     double least_probability, size_t least_match, size_t window) {
  std::unique_ptr<Drafter> drafter;
  if (draft)
    drafter = std::make_unique<ModelDrafter>(*draft, engine.decoder().vocab_size, least_probability);
  else if (window > 0)
    drafter = std::make_unique<SelfDrafter>(engine, window, least_probability);
  else
    drafter = std::make_unique<LookupDrafter>(least_match);
  new (self) Speculator(engine, std::move(drafter), {gamma, is_adaptive});
}

nb::list decode(Speculator& speculator, SequenceId sequence, Tokens tokens, size_t count, size_t most,
                Tokens stops, const Sampling& sampling, size_t logprobs) {
  Ids ids = copied(tokens), ends = copied(stops);
  std::vector<Choice> chosen;
  {
    nb::gil_scoped_release release;
    chosen = speculator.decode(sequence, ids, count, most, ends, sampling, logprobs);
  }
  return as_list(chosen);
}

nb::dict counts(Speculator& speculator) {
  SpeculationCounts c;
  {
    nb::gil_scoped_release release;
    c = speculator.counts();
  }
  nb::dict result;
  nb::list by_size;
  for (const VerifyUse& use : c.by_size) {
    nb::dict entry = as_dict(use.stats);
    entry["steps"] = use.steps;
    by_size.append(entry);
  }
  result["rounds"] = c.rounds;
  result["drafted"] = c.drafted;
  result["accepted"] = c.accepted;
  result["chosen"] = c.chosen;
  result["tested_at"] = c.tested_at;
  result["accepted_at"] = c.accepted_at;
  result["draft_seconds"] = c.draft_seconds;
  result["verify_seconds"] = c.verify_seconds;
  result["draft_weight_bytes"] = c.draft_weight_bytes;
  result["draft_kv_bytes"] = c.draft_kv_bytes;
  result["by_size"] = by_size;
  return result;
}

}  // namespace

void bind_speculator(nb::module_& module) {
  nb::class_<Speculator>(module, "Speculator")
      .def("__init__", &make_speculator, "engine"_a, "draft"_a.none(), "gamma"_a, "is_adaptive"_a,
           "least_probability"_a, "least_match"_a, "window"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
      .def("read", &Speculator::read, "sequence"_a, "next"_a, Released())
      .def("decode", &decode, "sequence"_a, "tokens"_a, "count"_a, "most"_a, "stops"_a, "sampling"_a,
           "logprobs"_a)
      .def("counts", &counts);
}

}  // namespace relufy::bindings
