#define GPT2_JAX_ROW_KERNELS kRowKernelsAvx2
#include "rows/row_kernels.inc"
