#define GPT2_JAX_ADAMW_KERNEL adamw_avx2
#include "adamw/adamw_kernel.inc"
