// A thread pool in place of XLA's. Tasks start in the order given; those left at the end run before
// the destructor returns.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "executor.h"

namespace gpt2_jax {

class ThreadPool {
 public:
  explicit ThreadPool(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
  }

  ~ThreadPool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void schedule(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    changed_.notify_one();
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return closing_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool closing_ = false;
  std::vector<std::thread> threads_;  // the last member, as the threads use the others
};

// The pool as an Executor of `num_threads`, whatever number of threads the pool has.
class PoolExecutor final : public Executor {
 public:
  PoolExecutor(ThreadPool& pool, int num_threads) : pool_(pool), num_threads_(num_threads) {}
  int num_threads() const override { return num_threads_; }
  void schedule(std::function<void()> task) override { pool_.schedule(std::move(task)); }

 private:
  ThreadPool& pool_;
  int num_threads_;
};

}  // namespace gpt2_jax
