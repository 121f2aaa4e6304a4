// Whether this process may use Intel's AMX.
#pragma once

#include <string>

#include "cpu_features.h"

namespace gpt2_jax {

// Why it may not, given these features and the operating system's answer; empty when it may.
// request_permission asks that this process may use the tile registers, and returns 0 or an errno;
// it is not called when a feature is missing. Without that permission the first tile instruction
// ends the process.
std::string amx_unavailable(CpuFeatures features, int (*request_permission)());

// The same for this process, found out once.
std::string amx_unavailable();

}  // namespace gpt2_jax
