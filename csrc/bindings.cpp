// The Python module relufy.engine._cpu: the engine's interface, numpy arrays in and out, the GIL released in
// a step.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <utility>

#include "engine.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Tokens = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using LogitsArray = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

relufy::Logits parse_logits(const std::string& name) {
  if (name == "none") return relufy::Logits::none;
  if (name == "last") return relufy::Logits::last;
  if (name == "all") return relufy::Logits::all;
  throw std::invalid_argument("logits must be 'last', 'all' or 'none', not '" + name + "'");
}

// Fills `logits`, float32 [rows, vocab_size], which Python made with the number of rows that the step gives.
void step(relufy::Engine& engine, const std::vector<std::pair<relufy::SequenceId, Tokens>>& work,
          const std::string& wanted, LogitsArray logits) {
  std::vector<relufy::Work> items;
  for (const auto& [sequence, tokens] : work) items.push_back({sequence, {tokens.data(), tokens.size()}});
  relufy::Logits which = parse_logits(wanted);
  if (logits.shape(0) != relufy::Engine::num_logits(items, which) ||
      logits.shape(1) != engine.decoder().vocab_size)
    throw std::invalid_argument("the array for the logits has the wrong shape");
  nb::gil_scoped_release release;
  engine.step(items, which, logits.data());
}

nb::dict stats(relufy::Engine& engine) {
  relufy::Stats s = engine.stats();
  nb::dict result;
  result["tokens"] = s.tokens;
  result["weight_bytes"] = s.weight_bytes;
  result["kv_bytes"] = s.kv_bytes;
  result["attention_inputs_used"] = s.attention_inputs_used;
  result["mlp_inputs_used"] = s.mlp_inputs_used;
  result["neurons_used"] = s.neurons_used;
  return result;
}

}  // namespace

NB_MODULE(_cpu, m) {
  nb::exception<relufy::FileError>(m, "FileError", PyExc_ValueError);
  nb::exception<relufy::OutOfKv>(m, "OutOfKv", PyExc_RuntimeError);
  nb::class_<relufy::Engine>(m, "Engine")
      .def(
          "__init__",
          [](relufy::Engine* self, const std::string& path, size_t threads, size_t context, bool skip) {
            new (self) relufy::Engine(path, {threads, context, skip});
          },
          "path"_a, "threads"_a, "context"_a, "skip"_a)
      .def("new_sequence", &relufy::Engine::new_sequence)
      .def("fork", &relufy::Engine::fork, "sequence"_a)
      .def("truncate", &relufy::Engine::truncate, "sequence"_a, "length"_a)
      .def("free", &relufy::Engine::free, "sequence"_a)
      .def("length", &relufy::Engine::length, "sequence"_a)
      .def("step", &step, "work"_a, "logits"_a, "out"_a)
      .def("stats", &stats)
      .def("reset_stats", &relufy::Engine::reset_stats)
      .def_prop_ro("threads", &relufy::Engine::threads)
      .def_prop_ro("context", &relufy::Engine::context)
      .def_prop_ro("isa", &relufy::Engine::isa)
      .def_prop_ro("vocab_size", [](const relufy::Engine& e) { return e.decoder().vocab_size; })
      .def_prop_ro("max_context", [](const relufy::Engine& e) { return e.decoder().max_context; });
}
