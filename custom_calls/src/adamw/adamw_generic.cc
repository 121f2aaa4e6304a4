#define GPT2_JAX_ADAMW_KERNEL adamw_generic
#include "adamw/adamw_kernel.inc"
