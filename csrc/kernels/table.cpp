// The table of one instruction set. See kernels.h for what each function promises.
//
// Compiled once per instruction set, under its own namespace; nothing with external linkage may be included
// here but the table itself, or the linker could pick another set's copy.
#include "attend.h"
#include "products.h"
#include "quantise.h"
#include "sets.h"
#include "vectors.h"

namespace relufy::RELUFY_KERNELS {

extern const Kernels table;
const Kernels table = {
#define RELUFY_NAME(isa) #isa
#define RELUFY_STRING(isa) RELUFY_NAME(isa)
    RELUFY_STRING(RELUFY_KERNELS),
    dot,
    scatter,
    expand,
    quantise,
    interleave,
    list_active,
    list_members,
    keep_members,
    reach,
    collect,
    activate,
    multiply,
    add,
    add_partials,
    rms_norm,
    layer_norm,
    rotate,
    attend,
    soft_cap,
    read};

}  // namespace relufy::RELUFY_KERNELS
