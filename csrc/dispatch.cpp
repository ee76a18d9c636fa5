// Chooses the kernels for the processor at hand.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace relufy {

#ifdef RELUFY_NEON
namespace neon {
extern const Kernels table;
}
#else
namespace portable {
extern const Kernels table;
}
#endif

#ifdef RELUFY_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

// From the fastest to the one that runs everywhere.
const Kernels* const kSupported[] = {
#ifdef RELUFY_X86
    __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c")
        ? &avx512::table
        : nullptr,
    __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
        ? &avx2::table
        : nullptr,
#endif
#ifdef RELUFY_NEON
    &neon::table};
#else
    &portable::table};
#endif

}  // namespace

const Kernels* find_kernels(const char* name) {
  for (const Kernels* candidate : kSupported)
    if (candidate && std::strcmp(candidate->name, name) == 0) return candidate;
  return nullptr;
}

const Kernels& kernels() {
  if (const char* forced = std::getenv("RELUFY_ISA"); forced && *forced) {
    if (const Kernels* found = find_kernels(forced)) return *found;
    throw std::invalid_argument("RELUFY_ISA=" + std::string(forced) + " can't run on this processor");
  }
  for (const Kernels* candidate : kSupported)
    if (candidate) return *candidate;
  throw std::logic_error("no kernels");
}

}  // namespace relufy
