#include "executor.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <utility>

namespace gpt2_jax {
namespace {

// State shared by the caller and its tasks. It outlives the call while a late task still holds it.
class Job {
 public:
  Job(int64_t count, const std::function<void(int64_t, int)>& item) : count_(count), item_(item) {}

  void take_items(int worker) {
    try {
      for (int64_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) item_(i, worker);
    } catch (...) {
      fail(std::current_exception());
    }
  }

  // Keeps the first error and makes everybody skip the items that nobody has taken yet.
  void fail(std::exception_ptr error) {
    next_ = count_;
    std::lock_guard<std::mutex> lock(mutex_);
    if (error_ == nullptr) error_ = std::move(error);
  }

  // All that a helper task does. item_ belongs to the caller, who waits only while helpers_ > 0: it
  // may be used only while this helper is counted there.
  void help() {
    int worker;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (closed_) return;
      ++helpers_;
      worker = ++last_worker_;
    }
    take_items(worker);
    std::lock_guard<std::mutex> lock(mutex_);
    if (--helpers_ == 0) idle_.notify_one();
  }

  // Throws the first exception of an item, if any.
  void close_and_wait_for_helpers() {
    std::unique_lock<std::mutex> lock(mutex_);
    closed_ = true;
    idle_.wait(lock, [this] { return helpers_ == 0; });
    if (error_ != nullptr) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  const int64_t count_;
  const std::function<void(int64_t, int)>& item_;
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::condition_variable idle_;
  int helpers_ = 0;
  int last_worker_ = 0;       // the caller is worker 0
  std::exception_ptr error_;  // the first
  bool closed_ = false;
};

}  // namespace

void parallel_for_with_workers(Executor& executor, int64_t count,
                               const std::function<void(int64_t, int)>& item) {
  const int64_t helpers = std::min<int64_t>(executor.num_threads(), count) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < count; ++i) item(i, 0);
    return;
  }
  auto job = std::make_shared<Job>(count, item);
  try {
    for (int64_t i = 0; i < helpers; ++i) executor.schedule([job] { job->help(); });
  } catch (...) {
    // Helpers may already run and use this frame's `item`, so wait for them below.
    job->fail(std::current_exception());
  }
  job->take_items(0);
  job->close_and_wait_for_helpers();
}

void parallel_for(Executor& executor, int64_t count, const std::function<void(int64_t)>& item) {
  parallel_for_with_workers(executor, count, [&item](int64_t i, int) { item(i); });
}

}  // namespace gpt2_jax
