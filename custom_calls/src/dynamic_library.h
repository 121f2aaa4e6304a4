// A shared library that is opened at run time, so that nothing of it is needed to build this one.
#ifndef GPT2_JAX_DYNAMIC_LIBRARY_H_
#define GPT2_JAX_DYNAMIC_LIBRARY_H_

#include <string>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace gpt2_jax {

class DynamicLibrary {
 public:
  // Opens the library of this file name or path; it stays open until the process ends.
  explicit DynamicLibrary(const char* path) {
#if defined(_WIN32)
    problem_ = std::string(path) + " cannot be opened on this system";
#else
    library_ = dlopen(path, RTLD_NOW);
    if (library_ == nullptr) problem_ = dlerror();
#endif
  }

  // Sets `function` to the library's function of this name. After the first problem nothing is
  // looked for.
  template <typename Function>
  void find(const char* name, Function& function) {
    if (!problem_.empty()) return;
#if !defined(_WIN32)
    function = reinterpret_cast<Function>(dlsym(library_, name));
#endif
    if (function == nullptr) problem_ = std::string(name) + " is not in the library";
  }

  // Why the library cannot be used; empty when it can.
  const std::string& problem() const { return problem_; }

 private:
  void* library_ = nullptr;
  std::string problem_;
};

}  // namespace gpt2_jax

#endif  // GPT2_JAX_DYNAMIC_LIBRARY_H_
