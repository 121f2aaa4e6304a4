#define GPT2_JAX_LEFT_LANES 8
#define GPT2_JAX_RIGHT_LANES 12
#define GPT2_JAX_PACK pack_f32_8x12
#define GPT2_JAX_FINISH finish_f32_8x12
#include "kernels/vector_portable.h"
// The vectors first.
#include "kernels/panels.inc"
