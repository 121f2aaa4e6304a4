// Stands in for CUDA's driver: takes any image whose first byte is not 'x', has one kernel, "known",
// and keeps what it was last asked to launch. And for cuBLASLt, which proposes two algorithms, the
// second of them the faster one, and keeps what it was last asked to multiply.
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {
int64_t last_launch[7];  // blocks, threads, shared bytes, stream, bytes of the parameters, the first two
int shared_bytes_allowed;
}  // namespace

FAKE_EXPORT int cuLibraryLoadData(void** library, const void* image, void*, void*, unsigned, void*,
                                  void*, unsigned) {
  *library = last_launch;
  return static_cast<const char*>(image)[0] == 'x' ? 200 : 0;
}

FAKE_EXPORT int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  *kernel = library;
  return std::strcmp(name, "known") == 0 ? 0 : 500;
}

FAKE_EXPORT int cuKernelSetAttribute(int attribute, int value, void*, int) {
  if (attribute != 8) return 1;
  shared_bytes_allowed = value;
  return 0;
}

FAKE_EXPORT int cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}

FAKE_EXPORT int cuLaunchKernel(void*, unsigned blocks, unsigned, unsigned, unsigned threads,
                               unsigned, unsigned, unsigned shared_bytes, void* stream,
                               void**, void** parameters) {
  // CU_LAUNCH_PARAM_BUFFER_POINTER, an address, CU_LAUNCH_PARAM_BUFFER_SIZE, another, the end
  if (parameters[0] != reinterpret_cast<void*>(1) || parameters[2] != reinterpret_cast<void*>(2) ||
      parameters[4] != nullptr) {
    return 1;
  }
  if (shared_bytes > 48 * 1024 && static_cast<int>(shared_bytes) > shared_bytes_allowed) return 701;
  last_launch[0] = blocks;
  last_launch[1] = threads;
  last_launch[2] = shared_bytes;
  last_launch[3] = reinterpret_cast<int64_t>(stream);
  last_launch[4] = *static_cast<int64_t*>(parameters[3]);
  for (int i = 0; i < 2; ++i) {
    last_launch[5 + i] = static_cast<const int64_t*>(parameters[1])[i];
  }
  return 0;
}

FAKE_EXPORT const int64_t* fake_last_launch() { return last_launch; }

namespace {
struct Operation {
  int epilogue = 0;
  const void* aux = nullptr;
  int64_t aux_stride = 0;
};
struct Matrix {
  uint64_t rows, columns;
};
struct Algorithm {
  uint64_t words[8];
  size_t workspace_bytes;
  int state;
  float waves;
  int reserved[4];
};
// epilogue, aux, its stride, rows and columns of a, b and d, workspace bytes, algorithm, products
int64_t last_product[12];
int capturing;
}  // namespace

FAKE_EXPORT const int64_t* fake_last_product() { return last_product; }
FAKE_EXPORT void fake_set_capturing(int value) { capturing = value; }

FAKE_EXPORT int cuStreamIsCapturing(void*, int* status) {
  *status = capturing;
  return 0;
}
FAKE_EXPORT int cuStreamSynchronize(void*) { return capturing == 0 ? 0 : 900; }

FAKE_EXPORT int cublasLtCreate(void** handle) {
  *handle = last_product;
  return 0;
}
FAKE_EXPORT int cublasLtMatmulDescCreate(Operation** operation, int compute, int scale) {
  *operation = new Operation;
  return compute == 68 && scale == 0 ? 0 : 7;
}
FAKE_EXPORT int cublasLtMatmulDescSetAttribute(Operation* operation, int attribute,
                                               const void* value, size_t size) {
  if (attribute == 7) std::memcpy(&operation->epilogue, value, size);
  if (attribute == 11) std::memcpy(&operation->aux, value, size);
  if (attribute == 12) std::memcpy(&operation->aux_stride, value, size);
  return 0;
}
FAKE_EXPORT int cublasLtMatmulDescDestroy(Operation* operation) {
  delete operation;
  return 0;
}
FAKE_EXPORT int cublasLtMatrixLayoutCreate(Matrix** matrix, int type, uint64_t rows,
                                           uint64_t columns, int64_t stride) {
  *matrix = new Matrix{rows, columns};
  return type == 14 && stride == static_cast<int64_t>(rows) ? 0 : 7;
}
FAKE_EXPORT int cublasLtMatrixLayoutDestroy(Matrix* matrix) {
  delete matrix;
  return 0;
}
FAKE_EXPORT int cublasLtMatmulPreferenceCreate(void** preference) {
  *preference = new char;
  return 0;
}
FAKE_EXPORT int cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) { return 0; }
FAKE_EXPORT int cublasLtMatmulPreferenceDestroy(void* preference) {
  delete static_cast<char*>(preference);
  return 0;
}
// For an odd number of rows it knows no algorithm.
FAKE_EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, Operation*, Matrix*, Matrix* b, Matrix*,
                                               Matrix*, void*, int most, Algorithm* found,
                                               int* count) {
  *count = b->columns % 2 == 1 ? 0 : 2;
  for (int i = 0; i < *count && i < most; ++i) found[i].words[0] = static_cast<uint64_t>(i + 1);
  return 0;
}
FAKE_EXPORT int cublasLtMatmul(void*, Operation* operation, const void*, const void*, Matrix* a,
                               const void*, Matrix* b, const void*, const void*, Matrix*, void*,
                               Matrix* d, const uint64_t* algorithm, void*, size_t workspace_bytes,
                               void*) {
  if (algorithm[0] == 1) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  const int64_t values[] = {operation->epilogue,
                            reinterpret_cast<int64_t>(operation->aux),
                            operation->aux_stride,
                            static_cast<int64_t>(a->rows),
                            static_cast<int64_t>(a->columns),
                            static_cast<int64_t>(b->rows),
                            static_cast<int64_t>(b->columns),
                            static_cast<int64_t>(d->rows),
                            static_cast<int64_t>(d->columns),
                            static_cast<int64_t>(workspace_bytes),
                            static_cast<int64_t>(algorithm[0]),
                            last_product[11] + 1};
  std::memcpy(last_product, values, sizeof(values));
  return 0;
}
