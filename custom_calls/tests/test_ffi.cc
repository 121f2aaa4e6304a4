// Tests the shared library through its C interface; this program takes XLA's place.
//
// It offers only the functions that every XLA since API 0.1 has in the same slots: errors, and
// scheduling on a thread pool. The other slots are null pointers, so a handler that calls one
// crashes here.
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "bfloat16.h"
#include "check.h"
#include "custom_calls.h"
#include "openblas.h"
#include "thread_pool.h"
#include "xla/ffi/api/c_api.h"
#include "xla_ffi.h"

struct XLA_FFI_Error {
  XLA_FFI_Error_Code code;
  std::string message;
};

namespace gpt2_jax {
namespace {

XLA_FFI_Error* create_error(XLA_FFI_Error_Create_Args* args) {
  return new XLA_FFI_Error{args->errc, args->message};
}

XLA_FFI_Error* schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  // The context is our pool; the type of `ctx` has another name in later versions of XLA.
  ThreadPool& pool = *reinterpret_cast<ThreadPool*>(args->ctx);
  pool.schedule([task = args->task, data = args->data] { task(data); });
  return nullptr;
}

XLA_FFI_Error* get_stream(XLA_FFI_Stream_Get_Args* args) {
  args->stream = reinterpret_cast<void*>(0x57);
  return nullptr;
}

struct Buffer {
  XLA_FFI_DataType dtype;
  std::vector<int64_t> dimensions;
  std::vector<float> values;  // the elements if float32; for other types only the memory

  explicit Buffer(std::vector<int64_t> dims, XLA_FFI_DataType type = XLA_FFI_DataType_F32)
      : dtype(type), dimensions(std::move(dims)) {
    int64_t count = 1;
    for (const int64_t dimension : dimensions) count *= dimension;
    for (int64_t i = 0; i < count; ++i) values.push_back(static_cast<float>(i % 7) - 3);
  }

  float element(int64_t i) const {
    if (dtype == XLA_FFI_DataType_F32) return values[i];
    uint16_t narrow;
    std::memcpy(&narrow, reinterpret_cast<const char*>(values.data()) + 2 * i, 2);
    return bfloat16_to_float(narrow);
  }
};

using Handler = XLA_FFI_Error* (*)(XLA_FFI_CallFrame*);

// One call as jax makes it. A test changes some members, then calls call().
struct Call {
  Handler handler = gpt2_jax_matmul;
  Buffer a{{2, 3}};
  Buffer b{{3, 4}};
  std::vector<Buffer> more;  // arguments after a and b
  bool alias = false;        // the last of them has out's memory
  bool b_is_out = false;     // b has out's memory too
  Buffer out{{2, 4}};
  std::vector<Buffer> more_results;  // after out
  std::map<std::string, int64_t> integers = {
      {"m", 2},           {"n", 4},        {"k", 3},        {"transpose_a", 0},
      {"transpose_b", 0}, {"a_offset", 0}, {"b_offset", 0}, {"num_threads", 2}};
  std::map<std::string, std::string> strings = {{"implementation", "threaded"},
                                                {"precision", "F32_F32_F32"}};
  std::map<std::string, std::vector<int64_t>> arrays;

  // Returns the error, or code OK.
  XLA_FFI_Error call() {
    ThreadPool pool(1);
    XLA_FFI_Api api = {};
    api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                       XLA_FFI_API_MINOR};
    api.XLA_FFI_Error_Create = create_error;
    api.XLA_FFI_ThreadPool_Schedule = schedule;
    api.XLA_FFI_Stream_Get = get_stream;

    std::deque<XLA_FFI_Buffer> buffers;  // a deque, so that their addresses do not change
    const auto buffer = [&](Buffer& from) -> void* {
      XLA_FFI_Buffer& to = buffers.emplace_back();
      to.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
      to.dtype = from.dtype;
      to.data = from.values.data();
      to.rank = static_cast<int64_t>(from.dimensions.size());
      to.dims = from.dimensions.data();
      return &to;
    };
    std::vector<void*> args = {buffer(a), buffer(b)};
    for (Buffer& argument : more) args.push_back(buffer(argument));
    std::vector<void*> rets = {buffer(out)};
    for (Buffer& result : more_results) rets.push_back(buffer(result));
    if (alias) static_cast<XLA_FFI_Buffer*>(args.back())->data = out.values.data();
    if (b_is_out) static_cast<XLA_FFI_Buffer*>(args[1])->data = out.values.data();
    std::vector<XLA_FFI_ArgType> arg_types(args.size(), XLA_FFI_ArgType_BUFFER);
    std::vector<XLA_FFI_RetType> ret_types(rets.size(), XLA_FFI_RetType_BUFFER);

    // XLA passes attributes sorted by name, and a map iterates in that order.
    std::map<std::string, void*> attributes;
    std::deque<XLA_FFI_Scalar> scalars;
    std::deque<XLA_FFI_ByteSpan> spans;
    std::deque<XLA_FFI_Array> vectors;
    for (auto& entry : arrays) {
      attributes[entry.first] = &vectors.emplace_back(
          XLA_FFI_Array{XLA_FFI_DataType_S64, entry.second.size(), entry.second.data()});
    }
    for (auto& entry : integers) {
      attributes[entry.first] =
          &scalars.emplace_back(XLA_FFI_Scalar{XLA_FFI_DataType_S64, &entry.second});
    }
    for (auto& entry : strings) {
      attributes[entry.first] =
          &spans.emplace_back(XLA_FFI_ByteSpan{entry.second.data(), entry.second.size()});
    }
    std::vector<XLA_FFI_AttrType> types;
    std::vector<XLA_FFI_ByteSpan*> names;
    std::vector<void*> values;
    for (const auto& entry : attributes) {
      types.push_back(strings.count(entry.first)  ? XLA_FFI_AttrType_STRING
                      : arrays.count(entry.first) ? XLA_FFI_AttrType_ARRAY
                                                  : XLA_FFI_AttrType_SCALAR);
      names.push_back(
          &spans.emplace_back(XLA_FFI_ByteSpan{entry.first.data(), entry.first.size()}));
      values.push_back(entry.second);
    }

    XLA_FFI_CallFrame frame = {};
    frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
    frame.api = &api;
    frame.ctx = reinterpret_cast<decltype(frame.ctx)>(&pool);
    frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
    frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(args.size()),
                  arg_types.data(), args.data()};
    frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(rets.size()),
                  ret_types.data(), rets.data()};
    frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE,
                   nullptr,
                   static_cast<int64_t>(values.size()),
                   types.data(),
                   names.data(),
                   values.data()};
    XLA_FFI_Error* error = handler(&frame);
    if (error == nullptr) return {XLA_FFI_Error_Code_OK, ""};
    const XLA_FFI_Error result = *error;
    delete error;
    return result;
  }
};

// The launch of a CUDA kernel, by a driver that only notes it.
void test_cuda_launch() {
  const auto load = [](const char* name, const char* symbol, const char* image) {
    const char* const problem = gpt2_jax_cuda_load(FAKE_CUDA_DRIVER, name, symbol, image);
    return std::string(problem == nullptr ? "" : problem);
  };
  CHECK(load("ours", "known", "image").empty(), load("ours", "known", "image"));
  CHECK(load("ours", "known", "x").empty(), "a name that is known stays");
  CHECK(load("bad", "known", "x") == "known: CUDA's error 200", load("bad", "known", "x"));
  CHECK(load("other", "unknown", "image") == "unknown: CUDA's error 500",
        load("other", "unknown", "image"));

  Call call;
  call.handler = gpt2_jax_cuda_launch;
  call.integers = {{"blocks", 7}, {"threads", 64}, {"shared_bytes", 100000}};
  call.strings = {{"kernel", "ours"}};
  call.arrays = {{"offsets", {0, 8, 0}}};
  call.alias = false;
  const XLA_FFI_Error error = call.call();
  CHECK(error.code == XLA_FFI_Error_Code_OK, error.message);
  const auto last = reinterpret_cast<const int64_t* (*)()>(
      dlsym(dlopen(FAKE_CUDA_DRIVER, RTLD_NOW), "fake_last_launch"))();
  const int64_t expected[] = {7, 64, 100000, 0x57, 3 * sizeof(void*),
                              reinterpret_cast<int64_t>(call.a.values.data()),
                              reinterpret_cast<int64_t>(call.b.values.data()) + 8};
  for (int i = 0; i < 7; ++i) CHECK(last[i] == expected[i], i << ": " << last[i]);

  call.arrays = {{"offsets", {0, 8}}};
  CHECK(call.call().code == XLA_FFI_Error_Code_INVALID_ARGUMENT, "an offset for every buffer");

  call.strings = {{"kernel", "nobody's"}};
  const XLA_FFI_Error unknown = call.call();
  CHECK(unknown.code == XLA_FFI_Error_Code_FAILED_PRECONDITION, unknown.message);
  CHECK(unknown.message.find("nobody's") != std::string::npos, unknown.message);
}

// A product of cuBLASLt's, by a library that only notes it.
void test_cublas() {
  const auto load = [](const char* path) {
    const char* const problem = gpt2_jax_cublas_load(FAKE_CUDA_DRIVER, path);
    return std::string(problem == nullptr ? "" : problem);
  };
  constexpr auto kBf16 = XLA_FFI_DataType_BF16;
  constexpr int64_t kRows = 6, kOutputs = 8, kInputs = 16;
  Call call;
  call.handler = gpt2_jax_cublas_gelu_backward;
  call.a = Buffer({kRows, kOutputs}, kBf16);
  call.b = Buffer({kOutputs, kInputs}, kBf16);
  call.more = {Buffer({kRows, kInputs}, kBf16)};
  call.out = Buffer({kRows, kInputs}, kBf16);
  call.more_results = {Buffer({1000}, XLA_FFI_DataType_U8)};
  call.integers = {{"tune", 0}};
  call.strings = {};

  XLA_FFI_Error error = call.call();
  CHECK(error.message.find("gpt2_jax_cublas_load was not called") != std::string::npos,
        error.message);
  CHECK(load("no/such/library").find("no/such/library") != std::string::npos, load("none"));
  CHECK(load(FAKE_CUDA_DRIVER).empty(), load(FAKE_CUDA_DRIVER));
  CHECK(load("no/such/library").empty(), "what is open stays open");

  void* const fake = dlopen(FAKE_CUDA_DRIVER, RTLD_NOW);
  const int64_t* const last =
      reinterpret_cast<const int64_t* (*)()>(dlsym(fake, "fake_last_product"))();
  const auto set_capturing = reinterpret_cast<void (*)(int)>(dlsym(fake, "fake_set_capturing"));
  const auto expect = [&](int64_t algorithm, const char* what) {
    error = call.call();
    CHECK(error.code == XLA_FFI_Error_Code_OK, error.message);
    // Matrices by columns: w^T (I, O), dy^T (O, M), dx^T (I, M).
    const int64_t expected[] = {192,      reinterpret_cast<int64_t>(call.more[0].values.data()),
                                kInputs,  kInputs,
                                kOutputs, kOutputs,
                                kRows,    kInputs,
                                kRows,    1000,
                                algorithm};
    for (int i = 0; i < 11; ++i) CHECK(last[i] == expected[i], what << ", " << i << ": " << last[i]);
  };
  expect(1, "cuBLASLt's favourite");
  call.integers = {{"tune", 1}};
  set_capturing(1);
  expect(1, "no timing while a graph is recorded");
  set_capturing(0);
  expect(2, "the fastest");
  const int64_t products = last[11];
  expect(2, "known");
  CHECK(last[11] == products + 1, "timed again: " << last[11]);

  call.a = Buffer({5, kOutputs}, kBf16);
  error = call.call();
  CHECK(error.message.find("expected dy (M, O), w (O, I), x and dx (M, I)") != std::string::npos,
        error.message);
  call.more = {Buffer({5, kInputs}, kBf16)};
  call.out = Buffer({5, kInputs}, kBf16);
  error = call.call();
  CHECK(error.message.find("got none") != std::string::npos, error.message);
}

void expect_error(Call call, XLA_FFI_Error_Code code, const std::vector<std::string>& parts) {
  const XLA_FFI_Error error = call.call();
  CHECK(error.code == code, "code " << error.code << ", " << error.message);
  for (const std::string& part : parts) {
    CHECK(error.message.find(part) != std::string::npos,
          "\"" << part << "\" is missing in: " << error.message);
  }
}

void expect_invalid(const Call& call, const std::vector<std::string>& parts) {
  expect_error(call, XLA_FFI_Error_Code_INVALID_ARGUMENT, parts);
}

void test_product() {
  std::vector<const char*> rungs = {"naive", "blocked", "simd", "threaded"};
  if (use_openblas_of_environment()) rungs.push_back("openblas");
  for (const char* rung : rungs) {
    Call call;
    call.strings["implementation"] = rung;
    const XLA_FFI_Error error = call.call();
    CHECK(error.code == XLA_FFI_Error_Code_OK, error.message);
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) {
        float sum = 0;
        for (int p = 0; p < 3; ++p) sum += call.a.values[i * 3 + p] * call.b.values[p * 4 + j];
        CHECK(call.out.values[i * 4 + j] == sum, rung << " " << call.out.values[i * 4 + j]);
      }
    }
  }
}

// A weight in a flat buffer, stored n x k; an x with leading dimensions.
void test_flat_buffer_and_leading_dimensions() {
  Call call;
  call.a = Buffer({2, 5, 3});
  call.b = Buffer({100});
  call.out = Buffer({2, 5, 4});
  call.integers["m"] = 10;
  call.integers["b_offset"] = 41;
  call.integers["transpose_b"] = 1;
  const XLA_FFI_Error error = call.call();
  CHECK(error.code == XLA_FFI_Error_Code_OK, error.message);
  for (int i = 0; i < 10; ++i) {
    for (int j = 0; j < 4; ++j) {
      float sum = 0;
      for (int p = 0; p < 3; ++p) sum += call.a.values[i * 3 + p] * call.b.values[41 + j * 3 + p];
      CHECK(call.out.values[i * 4 + j] == sum, call.out.values[i * 4 + j]);
    }
  }
}

// Weight and bias in one flat buffer; float32 and, rounded once, bfloat16 out.
void test_bias() {
  for (const XLA_FFI_DataType dtype : {XLA_FFI_DataType_F32, XLA_FFI_DataType_BF16}) {
    Call call;
    call.handler = gpt2_jax_matmul_bias;
    call.b = Buffer({100});
    call.more = {Buffer({100})};
    call.out = Buffer({2, 4}, dtype);
    call.integers["b_offset"] = 41;
    call.integers["bias_offset"] = 96;
    const XLA_FFI_Error error = call.call();
    CHECK(error.code == XLA_FFI_Error_Code_OK, error.message);
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) {
        float sum = call.more[0].values[96 + j];
        for (int p = 0; p < 3; ++p) {
          sum += call.a.values[i * 3 + p] * call.b.values[41 + p * 4 + j];
        }
        CHECK(call.out.element(i * 4 + j) == sum, call.out.element(i * 4 + j));
      }
    }
  }
}

// A gradient written into, or added to, a part of a flat buffer: in place, and with target and out
// not aliased.
void test_into() {
  for (const bool alias : {false, true}) {
    for (const int64_t accumulate : {0, 1}) {
      Call call;
      call.handler = gpt2_jax_matmul_into;
      call.more = {Buffer({50})};
      call.out = Buffer({50});
      call.more_results = {Buffer({})};
      if (!alias) call.out.values.assign(50, -1000);
      call.alias = alias;
      call.integers["out_offset"] = 42;
      call.integers["accumulate"] = accumulate;
      const Buffer before({50});
      const XLA_FFI_Error error = call.call();
      CHECK(error.code == XLA_FFI_Error_Code_OK, error.message);
      float squares = 0;
      for (int at = 0; at < 50; ++at) {
        float expected = before.values[at];
        if (at >= 42) {
          const int i = (at - 42) / 4, j = (at - 42) % 4;
          if (!accumulate) expected = 0;
          for (int p = 0; p < 3; ++p) {
            expected += call.a.values[i * 3 + p] * call.b.values[p * 4 + j];
          }
        }
        CHECK(call.out.values[at] == expected, "alias " << alias << " accumulate " << accumulate
                                                        << " at " << at << ": "
                                                        << call.out.values[at]);
        if (at >= 42) squares += expected * expected;
      }
      CHECK(call.more_results[0].values[0] == squares, call.more_results[0].values[0]);
    }
  }
}

void test_invalid_bias() {
  Call bias;
  bias.handler = gpt2_jax_matmul_bias;
  bias.more = {Buffer({6})};
  bias.integers["bias_offset"] = 0;
  for (const int64_t offset : {int64_t{3}, int64_t{-1}, INT64_MAX, INT64_MIN}) {
    Call call = bias;
    call.integers["bias_offset"] = offset;
    expect_invalid(call, {"gpt2_jax_matmul_bias: expected bias of dtype f32 and rank 1 to hold 4",
                          "a f32[2,3], b f32[3,4], bias f32[6], out f32[2,4]"});
  }
  Call call = bias;
  call.more = {Buffer({1, 4})};
  expect_invalid(call, {"expected bias", "rank 1", "bias f32[1,4]"});
  call = bias;
  call.more = {Buffer({4}, XLA_FFI_DataType_BF16)};
  expect_invalid(call, {"expected bias of dtype f32", "bias bf16[4]"});
  call = bias;
  call.integers["out_offset"] = 0;
  expect_invalid(call, {"expected 11 attributes, got 12"});
  call = bias;
  call.integers.erase("bias_offset");
  expect_invalid(call, {"expected an attribute bias_offset of type int64"});
  call = bias;
  call.strings["precision"] = "BF16_BF16_F32_X3";
  expect_error(call, XLA_FFI_Error_Code_UNIMPLEMENTED,
               {"gpt2_jax_matmul_bias: threaded refuses", "+ bias -> f32[2,4]"});
}

void test_invalid_target() {
  Call into;
  into.handler = gpt2_jax_matmul_into;
  into.more = {Buffer({50})};
  into.out = Buffer({50});
  into.more_results = {Buffer({})};
  into.integers["out_offset"] = 0;
  into.integers["accumulate"] = 0;
  for (const int64_t offset : {int64_t{43}, int64_t{-1}, INT64_MAX, INT64_MIN}) {
    Call call = into;
    call.integers["out_offset"] = offset;
    expect_invalid(call, {"gpt2_jax_matmul_into: expected out to hold a matrix [2,4] from element",
                          "a f32[2,3], b f32[3,4], target f32[50], out f32[50], squares f32[]"});
  }
  Call call = into;
  call.integers["accumulate"] = 2;
  expect_invalid(call, {"accumulate 0 or 1, got 2"});
  call = into;
  call.more = {Buffer({51})};
  expect_invalid(call, {"expected out of dtype f32 and rank 1 to hold 51", "target f32[51]"});
  call = into;
  call.out = Buffer({51});
  expect_invalid(call, {"expected target of dtype f32 and rank 1 to hold 51", "out f32[51]"});
  call = into;
  call.more_results = {Buffer({2})};
  expect_invalid(call, {"squares", "squares f32[2]"});
  call = into;
  call.more = {Buffer({5, 10})};
  call.out = Buffer({5, 10});
  expect_invalid(call, {"rank 1", "target f32[5,10]"});
  // b lies in out's memory: first right beside the written part, then one element inside it.
  call = into;
  call.b = Buffer({50});
  call.b_is_out = true;
  call.integers["b_offset"] = 8;
  const XLA_FFI_Error beside = call.call();
  CHECK(beside.code == XLA_FFI_Error_Code_OK, beside.message);
  call.integers["b_offset"] = 7;
  expect_invalid(call, {"expected a and b outside the part of out that is written"});
}

void test_invalid_arguments() {
  const std::vector<std::string> found = {"expected", "f32[3,4]", "out f32[2,4]"};
  Call call;
  call.a = Buffer({2, 3}, XLA_FFI_DataType_S32);
  expect_invalid(call, {"expected a of dtype f32 or bf16", "s32[2,3]", "f32[3,4]"});
  call = Call();
  call.a = Buffer({2, 5});
  expect_invalid(
      call, {"expected a to hold a matrix [2,3]", "last dimension of 3", "f32[2,5]", "f32[3,4]"});
  call = Call();
  call.integers["b_offset"] = 1;
  expect_invalid(call, {"expected b to hold a matrix [3,4] from element 1", "f32[3,4]"});
  for (const int64_t offset : {int64_t{-1}, INT64_MAX, INT64_MIN}) {
    call = Call();
    call.integers["a_offset"] = offset;
    expect_invalid(call, {"expected a to hold"});
  }
  for (const char* name : {"m", "n", "k"}) {
    for (const int64_t size : {int64_t{-1}, int64_t{5}, INT64_MAX}) {
      call = Call();
      call.integers[name] = size;
      expect_invalid(call, found);
    }
  }
  call = Call();
  call.out = Buffer({3, 4});
  expect_invalid(call, {"expected out to hold exactly [2,4]", "out f32[3,4]"});
  call = Call();
  call.integers["transpose_a"] = 2;
  expect_invalid(call, {"transpose_a 0 or 1, got 2"});
  call = Call();
  call.integers["num_threads"] = 0;
  expect_invalid(call, {"num_threads >= 1, got 0"});
  for (const Handler handler : {gpt2_jax_gelu_backward, gpt2_jax_attention_backward}) {
    for (const int64_t count : {int64_t{0}, int64_t{-1}}) {
      call = Call();
      call.handler = handler;
      call.integers = {{"num_threads", count}};
      call.b = Buffer({2, 3});
      call.out = Buffer({2, 3});
      if (handler == gpt2_jax_attention_backward) {
        call.integers["num_heads"] = 1;
        call.a = call.out = Buffer({1, 2, 3});
        call.b = Buffer({1, 2, 1});
        call.more = {Buffer({1, 1, 2}), Buffer({1, 2, 1})};
      } else {
        call.strings.clear();
      }
      expect_invalid(call, {"num_threads >= 1, got " + std::to_string(count)});
    }
  }
  call = Call();
  call.strings["implementation"] = "magic";
  expect_invalid(call, {"naive, blocked, simd, threaded, amx", "\"magic\""});
  call = Call();
  call.strings["precision"] = "HIGHEST";
  expect_invalid(call, {"BF16_BF16_F32_X3", "\"HIGHEST\""});
  call = Call();
  call.strings["precision"] = "BF16_BF16_F32_X3";
  expect_error(call, XLA_FFI_Error_Code_UNIMPLEMENTED, {"threaded refuses", "ask for"});
}

void test_empty() {
  Call call;
  call.a = Buffer({0, 3});
  call.out = Buffer({0, 4});
  call.integers["m"] = 0;
  const XLA_FFI_Error empty = call.call();
  CHECK(empty.code == XLA_FFI_Error_Code_OK, empty.message);
  call = Call();
  call.a = Buffer({2, 0});
  call.b = Buffer({0, 4});
  call.integers["k"] = 0;
  const XLA_FFI_Error no_k = call.call();
  CHECK(no_k.code == XLA_FFI_Error_Code_OK, no_k.message);
  for (const float value : call.out.values) CHECK(value == 0, value);
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kMemoryCanRunOut = false;  // these sanitizers end the program instead
#else
constexpr bool kMemoryCanRunOut = true;
#endif

// This bfloat16 product needs a copy that is larger than any machine's memory. The copy is
// allocated before any operand is read.
void test_out_of_memory() {
  if (!kMemoryCanRunOut || !use_openblas_of_environment()) return;
  constexpr int64_t kRows = 1 << 20, kColumns = 1 << 30;
  Call call;
  call.strings["implementation"] = "openblas";
  call.a.dtype = call.b.dtype = XLA_FFI_DataType_BF16;
  call.a.dimensions = {kRows, kColumns};
  call.b.dimensions = {kColumns, 1};
  call.out.dimensions = {kRows, 1};
  call.integers["m"] = kRows;
  call.integers["n"] = 1;
  call.integers["k"] = kColumns;
  expect_error(call, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED,
               {"gpt2_jax_matmul: out of memory; found a bf16[1048576,1073741824]"});
}

// The scores of these heads are too large as well. Each item allocates them on its own thread.
void test_out_of_memory_on_the_pool() {
  if (!kMemoryCanRunOut) return;
  constexpr int64_t kBatch = 8, kTime = int64_t{1} << 40, kHeads = 2;
  Call call;
  call.handler = gpt2_jax_attention_backward;
  call.integers = {{"num_heads", kHeads}, {"num_threads", 4}};
  call.more = {Buffer({1}), Buffer({1})};
  call.a.dimensions = call.out.dimensions = {kBatch, kTime, 3 * kHeads};  // qkv, dqkv
  call.b.dimensions = call.more[1].dimensions = {kBatch, kTime, kHeads};  // out, dout
  call.more[0].dimensions = {kBatch, kHeads, kTime};                      // log_sums
  expect_error(call, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED,
               {"gpt2_jax_attention_backward: out of memory; found qkv f32[8,1099511627776,6]"});
}

xla::ffi::Error throw_error(int) { throw std::runtime_error("what it says"); }
xla::ffi::Error throw_bad_alloc(int) { throw std::bad_alloc(); }
xla::ffi::Error throw_number(int) { throw 7; }

// No exception may cross the C interface, from wherever in a handler it comes.
void test_exceptions_become_errors() {
  const xla::ffi::Error error = guarded<throw_error>(1);
  CHECK(error.errc() == xla::ffi::ErrorCode::kInternal, error.message());
  CHECK(error.message() == "gpt2_jax custom call: what it says", error.message());
  const xla::ffi::Error memory = guarded<throw_bad_alloc>(1);
  CHECK(memory.errc() == xla::ffi::ErrorCode::kResourceExhausted, memory.message());
  const xla::ffi::Error unknown = guarded<throw_number>(1);
  CHECK(unknown.errc() == xla::ffi::ErrorCode::kInternal, unknown.message());
}

void test_describe() {
  const std::string text = gpt2_jax_custom_calls_describe();
  for (const char* part : {"\"version\": ", "\"xla_ffi_api\": \"0.",
                           "{\"name\": \"naive\", "
                           "\"available\": true, \"reason\": \"\", \"precisions\": "
                           "[\"F32_F32_F32\", \"BF16_BF16_F32\"]}",
                           "\"cpu_features\": {\"seen\": [", "\"kernel\": \"f32_"}) {
    CHECK(text.find(part) != std::string::npos, part << " is missing in " << text);
  }
}

}  // namespace
}  // namespace gpt2_jax

int main() {
  using namespace gpt2_jax;
  test_product();
  test_cuda_launch();
  test_cublas();
  test_flat_buffer_and_leading_dimensions();
  test_bias();
  test_into();
  test_invalid_arguments();
  test_invalid_bias();
  test_invalid_target();
  test_empty();
  test_out_of_memory();
  test_out_of_memory_on_the_pool();
  test_exceptions_become_errors();
  test_describe();
  return report("test_ffi");
}
