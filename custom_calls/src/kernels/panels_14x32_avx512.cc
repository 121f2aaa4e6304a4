#define GPT2_JAX_LEFT_LANES 14
#define GPT2_JAX_RIGHT_LANES 32
#define GPT2_JAX_PACK pack_f32_14x32
#define GPT2_JAX_FINISH finish_f32_14x32
#include "kernels/vector_avx512.h"
// The vectors first.
#include "kernels/panels.inc"
