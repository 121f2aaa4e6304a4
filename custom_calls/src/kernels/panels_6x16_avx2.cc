#define GPT2_JAX_LEFT_LANES 6
#define GPT2_JAX_RIGHT_LANES 16
#define GPT2_JAX_PACK pack_f32_6x16
#define GPT2_JAX_FINISH finish_f32_6x16
#include "kernels/vector_avx2.h"
// The vectors first.
#include "kernels/panels.inc"
