// The XLA FFI handler of a matrix product of cuBLASLt's that applies the derivative of GELU on its way
// out, and the entry that opens cuBLASLt. XLA offers no such product.
#include <chrono>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "custom_calls.h"
#include "dynamic_library.h"
#include "xla/ffi/api/ffi.h"
#include "xla_ffi.h"

namespace gpt2_jax {
namespace {

namespace ffi = xla::ffi;

// cuBLASLt's API, as far as it is used; cublasLt.h has the types and the numbers.
using Status = int;
using CudaStream = struct CudaStreamOpaque*;
using Handle = struct HandleOpaque*;
using Operation = struct OperationOpaque*;
using Matrix = struct MatrixOpaque*;
using Preference = struct PreferenceOpaque*;

constexpr int kFloat32 = 0, kBfloat16 = 14;                       // cudaDataType_t
constexpr int kComputeFloat32 = 68;                               // cublasComputeType_t
constexpr int kEpilogue = 7, kAuxPointer = 11, kAuxStride = 12;   // of an operation
constexpr int kGeluDerivative = 192;                              // CUBLASLT_EPILOGUE_DGELU
constexpr int kMostWorkspace = 1;                                 // of a preference
constexpr int kMostAlgorithms = 8;                                // that are asked for at once
constexpr int kRuns = 3;                                          // of each that is timed
constexpr int64_t kOutputs = 768, kInputs = 3072;                 // of a shape with many proposals

struct Heuristic {
  uint64_t algorithm[8];
  size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};

struct Cublas {
  Status (*create)(Handle*) = nullptr;
  Status (*operation_create)(Operation*, int, int) = nullptr;
  Status (*operation_set)(Operation, int, const void*, size_t) = nullptr;
  Status (*operation_destroy)(Operation) = nullptr;
  Status (*matrix_create)(Matrix*, int, uint64_t, uint64_t, int64_t) = nullptr;
  Status (*matrix_destroy)(Matrix) = nullptr;
  Status (*preference_create)(Preference*) = nullptr;
  Status (*preference_set)(Preference, int, const void*, size_t) = nullptr;
  Status (*preference_destroy)(Preference) = nullptr;
  Status (*heuristic)(Handle, Operation, Matrix, Matrix, Matrix, Matrix, Preference, int,
                      Heuristic*, int*) = nullptr;
  Status (*multiply)(Handle, Operation, const void*, const void*, Matrix, const void*, Matrix,
                     const void*, const void*, Matrix, void*, Matrix, const uint64_t*, void*,
                     size_t, CudaStream) = nullptr;
  // Of CUDA's driver.
  int (*context_get_device)(int*) = nullptr;
  int (*stream_is_capturing)(CudaStream, int*) = nullptr;
  int (*stream_synchronize)(CudaStream) = nullptr;
  std::string problem = "gpt2_jax_cublas_load was not called";
};

// What cuBLASLt proposes for a shape, its favourite first, and the one to use.
struct Algorithms {
  std::vector<Heuristic> proposed;
  size_t best = 0;
  bool timed = false;
};

// rows, outputs and inputs of the linear layer, and the number of the GPU
using Shape = std::tuple<int64_t, int64_t, int64_t, int>;

// What this process knows of cuBLASLt.
struct State {
  std::mutex mutex;
  Cublas cublas;
  std::map<int, Handle> handles;  // by GPU
  std::map<Shape, Algorithms> algorithms;
};

State& the_state() {
  static State* const all = new State;
  return *all;
}

// Destroys what it holds at the end of its scope.
template <typename Thing>
struct Owned {
  explicit Owned(Status (*destroy)(Thing)) : destroy(destroy) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() {
    if (thing != nullptr) destroy(thing);
  }
  Status (*destroy)(Thing);
  Thing thing = nullptr;
};

// The first failure of a chain of calls, 0 without one.
struct Chain {
  Status failure = 0;
  template <typename Function, typename... Arguments>
  void call(Function function, Arguments... arguments) {
    if (failure == 0) failure = function(arguments...);
  }
};

// The product of one call, as cuBLASLt is told of it. cuBLAS stores matrices by columns: it computes
// dx^T = w^T dy^T, and finds the transposes where the matrices lie.
struct Product {
  Product(const Cublas& cublas, int64_t rows, int64_t outputs, int64_t inputs, const void* x)
      : operation(cublas.operation_destroy),
        weight(cublas.matrix_destroy),
        in(cublas.matrix_destroy),
        out(cublas.matrix_destroy) {
    chain.call(cublas.operation_create, &operation.thing, kComputeFloat32, kFloat32);
    chain.call(cublas.operation_set, operation.thing, kEpilogue, &kGeluDerivative, sizeof(int));
    chain.call(cublas.operation_set, operation.thing, kAuxPointer, &x, sizeof(x));
    chain.call(cublas.operation_set, operation.thing, kAuxStride, &inputs, sizeof(inputs));
    chain.call(cublas.matrix_create, &weight.thing, kBfloat16, inputs, outputs, inputs);
    chain.call(cublas.matrix_create, &in.thing, kBfloat16, outputs, rows, outputs);
    chain.call(cublas.matrix_create, &out.thing, kBfloat16, inputs, rows, inputs);
  }
  Owned<Operation> operation;
  Owned<Matrix> weight, in, out;
  Chain chain;
};

// Adds what cuBLASLt proposes for a product to `all`.
void propose(const Cublas& cublas, Handle handle, Product& product, size_t room, Algorithms& all) {
  const size_t before = all.proposed.size();
  all.proposed.resize(before + kMostAlgorithms);
  int count = 0;
  Owned<Preference> preference(cublas.preference_destroy);
  Chain& chain = product.chain;
  chain.call(cublas.preference_create, &preference.thing);
  chain.call(cublas.preference_set, preference.thing, kMostWorkspace, &room, sizeof(room));
  chain.call(cublas.heuristic, handle, product.operation.thing, product.weight.thing,
             product.in.thing, product.out.thing, product.out.thing, preference.thing,
             kMostAlgorithms, all.proposed.data() + before, &count);
  all.proposed.resize(before + (chain.failure == 0 ? count : 0));
}

ffi::Error gelu_backward_handler(CudaStream stream, ffi::Buffer<ffi::BF16> dy,
                                 ffi::Buffer<ffi::BF16> w, ffi::Buffer<ffi::BF16> x,
                                 ffi::Result<ffi::Buffer<ffi::BF16>> dx,
                                 ffi::Result<ffi::Buffer<ffi::U8>> workspace, int64_t tune) {
  const auto error = [](const std::string& text) {
    return ffi::Error(ffi::ErrorCode::kInternal, "gpt2_jax_cublas_gelu_backward: " + text);
  };
  const auto is = [](auto dimensions, int64_t rows, int64_t columns) {
    return dimensions.size() == 2 && dimensions[0] == rows && dimensions[1] == columns;
  };
  if (dy.dimensions().size() != 2 || w.dimensions().size() != 2) {
    return error("expected dy and w to be matrices");
  }
  const int64_t rows = dy.dimensions()[0], outputs = dy.dimensions()[1];
  const int64_t inputs = w.dimensions()[1];
  if (!is(w.dimensions(), outputs, inputs) || !is(x.dimensions(), rows, inputs) ||
      !is(dx->dimensions(), rows, inputs)) {
    return error("expected dy (M, O), w (O, I), x and dx (M, I)");
  }
  if (rows == 0) return ffi::Error::Success();

  State& state = the_state();
  // Held throughout, so that nobody else's product is running while algorithms are timed.
  const std::lock_guard<std::mutex> lock(state.mutex);
  const Cublas& cublas = state.cublas;
  if (!cublas.problem.empty()) return error(cublas.problem);
  int device = 0, capturing = 0;
  int failure = cublas.context_get_device(&device);
  if (failure == 0) failure = cublas.stream_is_capturing(stream, &capturing);
  if (failure != 0) return error("got CUDA's error " + std::to_string(failure));

  Product product(cublas, rows, outputs, inputs, x.untyped_data());
  Chain& chain = product.chain;
  Handle& handle = state.handles[device];
  if (handle == nullptr) chain.call(cublas.create, &handle);
  const size_t room = workspace->size_bytes();
  Algorithms& algorithms = state.algorithms[Shape(rows, outputs, inputs, device)];
  if (algorithms.proposed.empty()) {
    propose(cublas, handle, product, room, algorithms);
    // For some shapes it proposes one alone, and that for an older GPU; what it proposes for another
    // shape is as good there.
    if (tune != 0) {
      Product other(cublas, rows, kOutputs, kInputs, x.untyped_data());
      propose(cublas, handle, other, room, algorithms);
    }
  }
  if (chain.failure == 0 && algorithms.proposed.empty()) {
    return error("expected an algorithm of cuBLASLt's for this shape, got none");
  }
  const auto multiply = [&](const Heuristic& algorithm) {
    const float one = 1, zero = 0;
    return cublas.multiply(handle, product.operation.thing, &one, w.untyped_data(),
                           product.weight.thing, dy.untyped_data(), product.in.thing, &zero,
                           dx->untyped_data(), product.out.thing, dx->untyped_data(),
                           product.out.thing, algorithm.algorithm, workspace->untyped_data(), room,
                           stream);
  };
  // Every algorithm writes the whole result, so that timing leaves the right one. A stream whose work
  // is being recorded cannot be waited for.
  if (tune != 0 && !algorithms.timed && capturing == 0 && chain.failure == 0) {
    double least = 0;
    for (size_t i = 0; i < algorithms.proposed.size(); ++i) {
      if (multiply(algorithms.proposed[i]) != 0) continue;  // it is not for this shape
      chain.call(cublas.stream_synchronize, stream);
      const auto start = std::chrono::steady_clock::now();
      for (int run = 0; run < kRuns; ++run) {
        chain.call(multiply, algorithms.proposed[i]);
      }
      chain.call(cublas.stream_synchronize, stream);
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
      if (least == 0 || taken.count() < least) {
        least = taken.count();
        algorithms.best = i;
      }
    }
    algorithms.timed = true;
  }
  if (chain.failure == 0) chain.call(multiply, algorithms.proposed[algorithms.best]);
  if (chain.failure != 0) return error("got cuBLASLt's error " + std::to_string(chain.failure));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gpt2_jax

const char* gpt2_jax_cublas_load(const char* driver, const char* path) {
  using namespace gpt2_jax;
  static thread_local std::string problem;
  Cublas cublas;
  DynamicLibrary cuda(driver), library(path);
  cuda.find("cuCtxGetDevice", cublas.context_get_device);
  cuda.find("cuStreamIsCapturing", cublas.stream_is_capturing);
  cuda.find("cuStreamSynchronize", cublas.stream_synchronize);
  library.find("cublasLtCreate", cublas.create);
  library.find("cublasLtMatmulDescCreate", cublas.operation_create);
  library.find("cublasLtMatmulDescSetAttribute", cublas.operation_set);
  library.find("cublasLtMatmulDescDestroy", cublas.operation_destroy);
  library.find("cublasLtMatrixLayoutCreate", cublas.matrix_create);
  library.find("cublasLtMatrixLayoutDestroy", cublas.matrix_destroy);
  library.find("cublasLtMatmulPreferenceCreate", cublas.preference_create);
  library.find("cublasLtMatmulPreferenceSetAttribute", cublas.preference_set);
  library.find("cublasLtMatmulPreferenceDestroy", cublas.preference_destroy);
  library.find("cublasLtMatmulAlgoGetHeuristic", cublas.heuristic);
  library.find("cublasLtMatmul", cublas.multiply);
  cublas.problem = cuda.problem().empty() ? library.problem() : cuda.problem();
  State& state = the_state();
  const std::lock_guard<std::mutex> lock(state.mutex);
  // Once it is open it stays as it is.
  if (!state.cublas.problem.empty()) state.cublas = cublas;
  problem = state.cublas.problem;
  return problem.empty() ? nullptr : problem.c_str();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_cublas_gelu_backward,
                              gpt2_jax::guarded<gpt2_jax::gelu_backward_handler>,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<gpt2_jax::CudaStream>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Attr<int64_t>("tune"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
