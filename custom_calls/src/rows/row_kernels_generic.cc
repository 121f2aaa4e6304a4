#define GPT2_JAX_ROW_KERNELS kRowKernelsGeneric
#include "rows/row_kernels.inc"
