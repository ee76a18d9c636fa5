// The Python module relufy.engine._cpu: the engine's interface, numpy arrays in and out, the GIL released
// while it works or waits.
#include "bindings.h"

#include <utility>

#include "bandwidth.h"
#include "predicted.h"
#include "reuse.h"

using namespace nanobind::literals;
using namespace relufy::bindings;

namespace {

using LogitsArray = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Row = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutRow = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bias = std::vector<std::pair<int32_t, float>>;
using Length = std::optional<size_t>;
using Released = nb::call_guard<nb::gil_scoped_release>;  // every call waits for the step that is under way

relufy::Logits parse_logits(const std::string& name) {
  if (name == "none") return relufy::Logits::none;
  if (name == "last") return relufy::Logits::last;
  if (name == "all") return relufy::Logits::all;
  throw std::invalid_argument("logits must be 'last', 'all' or 'none', not '" + name + "'");
}

// Fills `logits`, float32 [rows, vocab_size], which Python made with the number of rows that the step gives.
void step(relufy::Engine& engine, const std::vector<std::pair<relufy::SequenceId, Tokens>>& work,
          const std::string& wanted, LogitsArray logits) {
  std::vector<Ids> ids;
  std::vector<relufy::Work> items;
  for (const auto& [sequence, tokens] : work) ids.push_back(copied(tokens));
  for (size_t i = 0; i < work.size(); ++i) items.push_back({work[i].first, ids[i]});
  relufy::Logits which = parse_logits(wanted);
  if (logits.shape(0) != relufy::Engine::num_logits(items, which) ||
      logits.shape(1) != engine.decoder().vocab_size)
    throw std::invalid_argument("the array for the logits has the wrong shape");
  nb::gil_scoped_release release;
  engine.step(items, which, logits.data());
}

nb::dict stats(relufy::Engine& engine) {
  relufy::Stats s;
  {
    nb::gil_scoped_release release;
    s = engine.stats();
  }
  return as_dict(s);
}

relufy::Dtype parse_dtype(const std::string& name) {
  const std::pair<const char*, relufy::Dtype> names[] = {{"f32", relufy::Dtype::f32},
                                                         {"bf16", relufy::Dtype::bf16},
                                                         {"f16", relufy::Dtype::f16},
                                                         {"int8", relufy::Dtype::int8},
                                                         {"int4", relufy::Dtype::int4}};
  for (auto [known, dtype] : names)
    if (name == known) return dtype;
  throw std::invalid_argument("there is no dtype '" + name + "'");
}

relufy::Options parse_options(size_t threads, size_t context, bool skip, const std::string& kv_dtype,
                              bool load, bool mlock) {
  relufy::Dtype kv = parse_dtype(kv_dtype);
  if (relufy::is_integer(kv)) throw std::invalid_argument("the KV cache can't be of " + kv_dtype);
  return {threads, context, skip, kv, load ? relufy::Memory::load : relufy::Memory::map, mlock};
}

void make_sampling(relufy::Sampling* self, double temperature, size_t top_k, double top_p, double min_p,
                   double repetition_penalty, double presence_penalty, double frequency_penalty,
                   const Bias& logit_bias, uint64_t seed) {
  new (self)
      relufy::Sampling{temperature,       top_k,      top_p, min_p, repetition_penalty, presence_penalty,
                       frequency_penalty, logit_bias, seed};
}

nb::list decode(relufy::Engine& engine, relufy::SequenceId sequence, Tokens tokens, size_t count,
                Tokens stops, const relufy::Sampling& sampling, size_t logprobs) {
  Ids ids = copied(tokens), ends = copied(stops);
  std::vector<relufy::Choice> chosen;
  {
    nb::gil_scoped_release release;
    chosen = engine.decode(sequence, ids, count, ends, sampling, logprobs);
  }
  return as_list(chosen);
}

void check_row(const relufy::Engine& engine, size_t size) {
  if (size != engine.decoder().vocab_size)
    throw std::invalid_argument("a row of logits has " + std::to_string(engine.decoder().vocab_size) +
                                " numbers, not " + std::to_string(size));
}

nb::tuple choose(relufy::Engine& engine, relufy::SequenceId sequence, Row logits,
                 const relufy::Sampling& sampling, size_t logprobs, Length length) {
  check_row(engine, logits.size());
  relufy::Choice choice;
  {
    nb::gil_scoped_release release;
    choice = engine.choose(sequence, logits.data(), sampling, logprobs, length);
  }
  return as_tuple(choice);
}

void probabilities(relufy::Engine& engine, relufy::SequenceId sequence, Row logits,
                   const relufy::Sampling& sampling, Length length, OutRow out) {
  check_row(engine, logits.size());
  check_row(engine, out.size());
  nb::gil_scoped_release release;
  engine.probabilities(sequence, logits.data(), sampling, length, out.data());
}

size_t reuse_prefix(relufy::Engine& engine, relufy::SequenceId sequence, Tokens tokens) {
  Ids ids = copied(tokens);
  nb::gil_scoped_release release;
  return engine.reuse_prefix(sequence, ids);
}

relufy::Product parse_product(const std::string& name) {
  if (name == "dot") return relufy::Product::dot;
  if (name == "scatter") return relufy::Product::scatter;
  throw std::invalid_argument("there is no kernel '" + name + "'");
}

double kernel_bandwidth(const std::string& kernel, const std::string& dtype, size_t rows, size_t columns,
                        double density, size_t threads, double seconds) {
  bool scatters = parse_product(kernel) == relufy::Product::scatter;
  if (rows == 0 || columns == 0 || !(density > 0.0 && density <= 1.0))
    throw std::invalid_argument("a kernel is timed with rows, columns, and a density above 0 and at most 1");
  relufy::Measured measured{scatters, parse_dtype(dtype), rows, columns, density};
  nb::gil_scoped_release release;
  return relufy::kernel_bandwidth(measured, threads, seconds);
}

void set_crossover(relufy::Engine& engine, const std::string& kernel, const std::string& dtype, size_t tokens,
                   float share) {
  engine.set_crossover(parse_product(kernel), parse_dtype(dtype), tokens, share);
}

double measure_crossover(const std::string& kernel, const std::string& dtype, size_t rows, size_t columns,
                         size_t tokens, size_t threads, double seconds) {
  if (rows == 0 || columns == 0 || tokens == 0)
    throw std::invalid_argument("a crossover is measured with rows, columns and tokens");
  bool scatters = parse_product(kernel) == relufy::Product::scatter;
  relufy::Measured measured{scatters, parse_dtype(dtype), rows, columns, 1.0, tokens};
  nb::gil_scoped_release release;
  return relufy::measure_crossover(measured, threads, seconds);
}

}  // namespace

nb::dict relufy::bindings::as_dict(const Stats& s) {
  nb::dict result, used, together;
  result["tokens"] = s.tokens;
  result["reused"] = s.reused;
  result["weight_bytes"] = s.weight_bytes;
  result["kv_bytes"] = s.kv_bytes;
  for (size_t site = 0; site < kNumSites; ++site) {
    std::vector<uint64_t> of_tokens, of_steps;
    for (const Use& use : s.used[site]) {
      of_tokens.push_back(use.by_token);
      of_steps.push_back(use.together);
    }
    used[kSiteNames[site]] = of_tokens;
    together[kSiteNames[site]] = of_steps;
  }
  result["used"] = used;
  result["used_together"] = together;
  result["limited"] = s.limited;
  std::vector<uint64_t> candidates, read;
  for (const Use& use : s.candidates) {
    candidates.push_back(use.by_token);
    read.push_back(use.together);
  }
  result["candidates"] = candidates;
  result["candidates_together"] = read;
  result["fired"] = s.fired;
  return result;
}

NB_MODULE(_cpu, m) {
  nb::exception<relufy::FileError>(m, "FileError", PyExc_ValueError);
  nb::exception<relufy::OutOfKv>(m, "OutOfKv", PyExc_RuntimeError);
  nb::class_<relufy::Sampling>(m, "Sampling")
      .def("__init__", &make_sampling, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a,
           "repetition_penalty"_a, "presence_penalty"_a, "frequency_penalty"_a, "logit_bias"_a, "seed"_a);
  bind_reuse(m);
  nb::class_<relufy::Engine>(m, "Engine")
      .def(
          "__init__",
          [](relufy::Engine* self, const std::string& path, size_t threads, size_t context, bool skip,
             const std::string& kv_dtype, bool load, bool mlock, const relufy::Engine* threads_of) {
            new (self) relufy::Engine(path, parse_options(threads, context, skip, kv_dtype, load, mlock),
                                      threads_of ? threads_of->thread_pool() : nullptr);
          },
          "path"_a, "threads"_a, "context"_a, "skip"_a, "kv_dtype"_a, "load"_a, "mlock"_a,
          "threads_of"_a.none())
      .def("new_sequence", &new_sequence, "prompt_length"_a, "reuse"_a.none(), "num_open"_a, Released())
      .def("fork", &fork_sequence, "sequence"_a, "reuse"_a.none(), Released())
      .def("refuses_candidates", &relufy::Engine::refuses_candidates)
      .def("refuses_prediction", &relufy::Engine::refuses_prediction)
      .def(
          "new_predicted_sequence",
          [](relufy::Engine& e, size_t prompt_length, size_t num_open) {
            return e.new_sequence(prompt_length, std::make_unique<relufy::Predicted>(num_open));
          },
          "prompt_length"_a, "num_open"_a, Released())
      .def("truncate", &relufy::Engine::truncate, "sequence"_a, "length"_a, Released())
      .def("free", &relufy::Engine::free, "sequence"_a, Released())
      .def("length", &relufy::Engine::length, "sequence"_a, Released())
      .def("tokens", &relufy::Engine::tokens, "sequence"_a, Released())
      .def("reuse_prefix", &reuse_prefix, "sequence"_a, "tokens"_a)
      .def("step", &step, "work"_a, "logits"_a, "out"_a)
      .def("decode", &decode, "sequence"_a, "tokens"_a, "count"_a, "stops"_a, "sampling"_a, "logprobs"_a)
      .def("choose", &choose, "sequence"_a, "logits"_a, "sampling"_a, "logprobs"_a, "length"_a.none())
      .def("probabilities", &probabilities, "sequence"_a, "logits"_a, "sampling"_a, "length"_a.none(),
           "out"_a)
      .def("stats", &stats)
      .def(
          "huge_page_share", [](const relufy::Engine& e) { return e.file().huge_page_share(); }, Released())
      .def("reset_stats", &relufy::Engine::reset_stats, Released())
      .def("set_crossover", &set_crossover, "kernel"_a, "dtype"_a, "tokens"_a, "share"_a)
      .def_prop_ro("threads", &relufy::Engine::threads)
      .def_prop_ro("context", &relufy::Engine::context)
      .def_prop_ro("free_positions", &relufy::Engine::free_positions, Released())
      .def_prop_ro("isa", &relufy::Engine::isa)
      .def_prop_ro("vocab_size", [](const relufy::Engine& e) { return e.decoder().vocab_size; })
      .def_prop_ro("max_context", [](const relufy::Engine& e) { return e.decoder().max_context; });
  bind_speculator(m);
  m.def("isa", [] { return relufy::kernels().name; });
  m.def("read_bandwidth", &relufy::read_bandwidth, nb::call_guard<nb::gil_scoped_release>(), "threads"_a,
        "bytes"_a, "seconds"_a);
  m.def("kernel_bandwidth", &kernel_bandwidth, "kernel"_a, "dtype"_a, "rows"_a, "columns"_a, "density"_a,
        "threads"_a, "seconds"_a);

  // Crossovers: shares of rows beyond which all are read.
  m.def("measure_crossover", &measure_crossover, "kernel"_a, "dtype"_a, "rows"_a, "columns"_a, "tokens"_a,
        "threads"_a, "seconds"_a);
}
