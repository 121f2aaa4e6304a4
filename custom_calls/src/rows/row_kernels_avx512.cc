#define GPT2_JAX_ROW_KERNELS kRowKernelsAvx512
#include "rows/row_kernels.inc"
