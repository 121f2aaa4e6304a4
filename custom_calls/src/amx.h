// Whether this process may use Intel's AMX.
#pragma once

#include <string>

#include "cpu_features.h"

namespace gpt2_jax {

// The reason why this process may not use AMX; empty when it may. `features` are the CPU's.
// request_permission asks the operating system for the tile registers and returns 0 or an errno; it
// is called only when no feature is missing. Without the permission the first tile instruction ends
// the process.
std::string amx_unavailable(CpuFeatures features, int (*request_permission)());

// The same for this CPU and this operating system. Asks once and keeps the answer.
std::string amx_unavailable();

}  // namespace gpt2_jax
