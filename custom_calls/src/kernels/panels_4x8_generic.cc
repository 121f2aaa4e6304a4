#define GPT2_JAX_LEFT_LANES 4
#define GPT2_JAX_RIGHT_LANES 8
#define GPT2_JAX_PACK pack_f32_4x8
#define GPT2_JAX_FINISH finish_f32_4x8
#include "kernels/vector_portable.h"
// The vectors first.
#include "kernels/panels.inc"
