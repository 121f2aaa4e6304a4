// Runs independent items of work on another library's threads and never waits for one of its tasks
// to start.
#pragma once

#include <cstdint>
#include <functional>

namespace gpt2_jax {

// A source of threads: XLA's pool in the custom call, ThreadPool in the tests.
class Executor {
 public:
  virtual ~Executor() = default;
  // Threads that may work at once, the calling one included; at least 1.
  virtual int num_threads() const = 0;
  // Runs `task` at a time that nothing may depend on: at once on this thread, later on another, or
  // long after the caller has returned.
  virtual void schedule(std::function<void()> task) = 0;
};

// Runs everything on the calling thread.
class InlineExecutor final : public Executor {
 public:
  int num_threads() const override { return 1; }
  void schedule(std::function<void()> task) override { task(); }
};

// Calls item(i) once for each i in [0, count), on any thread, and returns when all
// are done. Items are begun in order of i. So an item may wait for one of a smaller i, which some thread
// is running, and for no other.
//
// When an item throws, on whatever thread, items not yet begun are skipped, and the caller gets the
// first exception once those that had begun are done. No exception reaches the pool.
//
// Safe to call from a thread of the executor's own pool, from any number of them at once: the
// caller takes items itself until none is left, then waits only for tasks that are already running
// one. A task that starts later finds the job closed and returns, so no thread ever waits for a
// task that needs a thread to start.
void parallel_for(Executor& executor, int64_t count, const std::function<void(int64_t)>& item);

// The same, calling item(i, worker). `worker` is in [0, executor.num_threads()), and no two items
// that run at the same time get the same one, so each worker can have memory of its own.
void parallel_for_with_workers(Executor& executor, int64_t count,
                               const std::function<void(int64_t, int)>& item);

}  // namespace gpt2_jax
