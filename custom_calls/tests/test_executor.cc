// parallel_for never waits for a task that has not started. A deadlock here is a time-out of ctest.
#include <atomic>
#include <thread>
#include <vector>

#include "check.h"
#include "executor.h"
#include "problem.h"
#include "registry.h"
#include "thread_pool.h"

namespace gpt2_jax {
namespace {

// Tasks that start only after everybody has gone.
class LateExecutor final : public Executor {
 public:
  int num_threads() const override { return 4; }
  void schedule(std::function<void()> task) override { tasks.push_back(std::move(task)); }
  std::vector<std::function<void()>> tasks;
};

// Tasks that run inside schedule(), as XLA's FFI does when it has no pool.
class ImmediateExecutor final : public Executor {
 public:
  int num_threads() const override { return 4; }
  void schedule(std::function<void()> task) override { task(); }
};

void check_every_item_once(Executor& executor, int64_t count, const char* who) {
  std::vector<std::atomic<int>> taken(count);
  std::vector<std::atomic<int>> busy(executor.num_threads());
  parallel_for_with_workers(executor, count, [&](int64_t i, int worker) {
    CHECK(busy[worker]++ == 0, who << ": two items of worker " << worker << " at once");
    ++taken[i];
    --busy[worker];
  });
  for (int64_t i = 0; i < count; ++i) {
    CHECK(taken[i] == 1,
          who << ": item " << i << " of " << count << " ran " << taken[i] << " times");
  }
}

void test_every_item_once() {
  ThreadPool pool(3);
  for (const int64_t count : {0, 1, 2, 3, 100, 1000}) {
    for (int threads = 1; threads <= 5; ++threads) {
      PoolExecutor executor(pool, threads);
      check_every_item_once(executor, count, "pool");
    }
    ImmediateExecutor immediate;
    check_every_item_once(immediate, count, "immediate");
    LateExecutor late;
    check_every_item_once(late, count, "late");
    // The items' vector is gone: a late task that took one would be caught by the sanitizers.
    for (const auto& task : late.tasks) task();
  }
}

void test_pool_without_threads() {
  ThreadPool empty(0);
  PoolExecutor executor(empty, 4);
  check_every_item_once(executor, 50, "empty pool");
}

// Several products at once, each called ON a thread of the pool that it asks for help, as XLA does;
// and as many from outside. The pool has one thread, or two.
void test_concurrent_callers(int pool_threads) {
  const Implementation& threaded = *find_implementation("threaded");
  std::atomic<int> left{24};
  {
    ThreadPool pool(pool_threads);
    const auto call = [&](int seed) {
      Random random(seed);
      Problem problem({61, 130, 70}, false, true, Types(), random);
      PoolExecutor executor(pool, 4);
      threaded.run(problem.matmul(), executor);
      problem.check("concurrent threaded");
      --left;
    };
    std::vector<std::thread> outside;
    for (int i = 0; i < 4; ++i) {
      outside.emplace_back([&call, i] {
        for (int j = 0; j < 3; ++j) call(100 + 3 * i + j);
      });
    }
    for (int i = 0; i < 12; ++i) pool.schedule([&call, i] { call(i); });
    for (std::thread& thread : outside) thread.join();
  }
  CHECK(left == 0, left << " calls did not finish");
}

}  // namespace
}  // namespace gpt2_jax

int main() {
  using namespace gpt2_jax;
  test_every_item_once();
  test_pool_without_threads();
  test_concurrent_callers(1);
  test_concurrent_callers(2);
  return report("test_executor");
}
