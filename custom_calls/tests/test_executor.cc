// parallel_for never waits for a task that has not started, and an item's exception reaches the
// caller only. A deadlock here shows as a time-out of ctest.
#include <atomic>
#include <chrono>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "executor.h"
#include "problem.h"
#include "registry.h"
#include "thread_pool.h"

namespace gpt2_jax {
namespace {

// Keeps the tasks, which the test runs after parallel_for has returned.
class LateExecutor final : public Executor {
 public:
  int num_threads() const override { return 4; }
  void schedule(std::function<void()> task) override { tasks.push_back(std::move(task)); }
  std::vector<std::function<void()>> tasks;
};

// Runs tasks inside schedule(), as XLA's FFI does when it has no pool.
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
    // The items' vector no longer exists: the sanitizers would report a late task that takes an
    // item.
    for (const auto& task : late.tasks) task();
  }
}

void test_pool_without_threads() {
  ThreadPool empty(0);
  PoolExecutor executor(empty, 4);
  check_every_item_once(executor, 50, "empty pool");
}

// Waits until `count` items have begun, so that `count` threads have one each.
void meet(std::atomic<int>& begun, int count) {
  ++begun;
  while (begun < count) std::this_thread::yield();
}

// One item for each thread. The items of some workers throw: of the caller (worker 0), of a helper,
// of everybody.
void test_exceptions_of_items() {
  for (int threads = 1; threads <= 4; ++threads) {
    ThreadPool pool(threads - 1);
    PoolExecutor executor(pool, threads);
    for (const bool caller_throws : {false, true}) {
      for (const bool helpers_throw : {false, true}) {
        const bool throws = caller_throws || (helpers_throw && threads > 1);
        std::atomic<int> begun{0}, done{0};
        std::string caught;
        try {
          parallel_for_with_workers(executor, threads, [&](int64_t, int worker) {
            meet(begun, threads);
            ++done;
            if (worker == 0 ? caller_throws : helpers_throw) throw std::runtime_error("an item's");
          });
        } catch (const std::runtime_error& error) {
          caught = error.what();
        }
        CHECK(caught == (throws ? "an item's" : ""), threads << " threads, caught: " << caught);
        CHECK(done == threads, done << " of " << threads << " items were done");
        check_every_item_once(executor, 100, "after an exception");
      }
    }
  }
}

void test_items_after_an_exception_are_skipped() {
  for (int threads = 1; threads <= 3; ++threads) {
    ThreadPool pool(2);
    PoolExecutor executor(pool, threads);
    std::atomic<int> begun{0};
    bool caught = false;
    try {
      parallel_for(executor, 1000, [&](int64_t) {
        ++begun;
        throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      caught = true;
    }
    CHECK(caught, threads << " threads");
    CHECK(begun <= threads, begun << " items began on " << threads << " threads");
  }
}

// Scheduling the second helper throws while the first helper runs an item.
void test_exception_of_schedule() {
  class Failing final : public Executor {
   public:
    explicit Failing(ThreadPool& pool) : pool_(pool) {}
    int num_threads() const override { return 3; }
    void schedule(std::function<void()> task) override {
      if (scheduled_++ == 1) {
        while (begun == 0) std::this_thread::yield();
        throw std::bad_alloc();
      }
      pool_.schedule(std::move(task));
    }
    std::atomic<int> begun{0};

   private:
    ThreadPool& pool_;
    int scheduled_ = 0;
  };
  ThreadPool pool(1);
  Failing executor(pool);
  std::atomic<int> done{0};
  bool caught = false;
  try {
    parallel_for(executor, 3, [&](int64_t) {
      ++executor.begun;
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      ++done;
    });
  } catch (const std::bad_alloc&) {
    caught = true;
  }
  CHECK(caught, "what schedule threw");
  CHECK(executor.begun == done, executor.begun << " items began, " << done << " are done");
}

// Several products at once, each called on a thread of the same pool that it asks for help, as XLA
// does; and as many from threads outside the pool. The pool has one thread or two.
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
  test_exceptions_of_items();
  test_items_after_an_exception_are_skipped();
  test_exception_of_schedule();
  test_concurrent_callers(1);
  test_concurrent_callers(2);
  return report("test_executor");
}
